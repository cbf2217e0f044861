"""Chat templates: what transformers writes, and nothing a stranger's program wants."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from llmos_jax.data import encode_chat, render, render_chat, tokenizer_of_folder
from llmos_jax.data.template import render_spans
from llmos_jax.errors import ConfigError, DataError

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "  Hi é 🙂\n"},
    {"role": "assistant", "content": "Yes.", "thinking": "hm"},
    {"role": "user", "content": "More"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é<&>"}}]
TEMPLATES = {
    "trim blocks": "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n"
    "    {% endif %}\n{% endfor %}\n",
    "prompt": "{{ messages|length }}{% if add_generation_prompt %}A:{% endif %}",
    "break and continue": "{% for m in messages %}{% if loop.index == 2 %}"
    "{% continue %}{% endif %}{% if loop.last %}{% break %}{% endif %}"
    "{{ m['role'] }} {{ loop.length }} {{ loop.revindex }};{% endfor %}",
    "tojson": "{{ tools|tojson }}{{ tools|tojson(indent=2) }}{{ messages[0]|tojson }}"
    "{{ {'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':')) }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}"
    "{% set ns.n = ns.n + m.content|length %}{% endfor %}{{ ns.n }}",
    "macro": "{% macro turn(m, end='!') %}{{ '<' ~ m.role ~ '>' + m.content|trim }}"
    "{{ end }}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "recursive": "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}"
    "[{{ loop(x) }}]{% else %}{{ x }}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}"
    "{% endgeneration %}|{% endfor %}",
    "year": "{{ strftime_now('%Y') }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}"
    "{{ m.get('nothing', '-') }}{% endfor %}",
    "slices": "{{ messages[1:][::-1]|map(attribute='role')|join(',') }}"
    "{{ bos_token }}{{ missing }}{{ 7 // 2 }}{{ '%s-%d' % ('a', 3) }}"
    "{{ '{}'.format(1) }}",
    "text methods": "{{ messages[1].content.strip().split(' ')[0].upper() }}"
    "{{ 'ab' * 3 }}{{ range(3)|list }}{{ documents is none }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_text_is_what_transformers_writes(name, prompt):
    peer = pytest.importorskip("transformers.utils.chat_template_utils")
    options = {"tools": TOOLS, "add_generation_prompt": prompt, "bos_token": "<s>"}
    (wanted,), _ = peer.render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], **options
    )
    assert render(TEMPLATES[name], MESSAGES, **options) == wanted
    assert wanted.strip()


def test_generation_blocks_are_found_in_the_text():
    text, spans = render_spans(TEMPLATES["generation"], MESSAGES)
    assert text == "".join(f"{message['content']}|" for message in MESSAGES)
    assert [text[a:b] for a, b in spans] == [one["content"] for one in MESSAGES]


def test_null_fields_are_as_good_as_missing():
    message = {"role": "user", "content": "x", "tool_calls": None}
    template = "{{ 'tool_calls' in messages[0] }}"
    assert render(template, [message]) == "False"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ('%s' | attr('__class__')).mro() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_there_is_no_way_out_of_the_sandbox(template):
    try:
        text = render(template, MESSAGES)
    except ConfigError as problem:
        assert "chat template fails" in str(problem)
    else:
        assert "class" not in text and "root:" not in text


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% set r = range(90000)|list %}{% for a in r %}{% for b in r %}"
        "{% set x = 1 %}{% endfor %}{% endfor %}",
        "{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ 10 ** 10 ** 9 }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x'|center(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{% set ns = namespace(x='y') %}{% for a in range(60) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='y') %}{% for a in range(60) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    ],
)
def test_a_template_without_end_is_stopped(template):
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="chat template"):
        render(template, MESSAGES)
    assert time.perf_counter() - start < 10


def test_what_a_template_raises_is_shown():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refuses the conversation: roles must"):
        render(template, MESSAGES)
    with pytest.raises(ConfigError, match=r"mistake in line 2: .*endfor"):
        render("a\n{% endfor %}", MESSAGES)
    with pytest.raises(ConfigError, match="fails: UndefinedError: .*nothing"):
        render("{{ nothing.at.all }}", MESSAGES)


@pytest.fixture(scope="module")
def models():
    folder = Path.home() / ".cache" / "llmos-models"
    if not (folder / "smollm2" / "hf").is_dir():
        pytest.skip("the real models are not here: tools/get-model fetches them")
    return folder


def test_smollm2_converses_as_transformers_does(models):
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(models / "smollm2" / "hf")
    ours = tokenizer_of_folder(models / "smollm2" / "hf")
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[:1]):
        text = render_chat(ours, messages, add_generation_prompt=True)
        assert text == peer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        wanted = peer.apply_chat_template(messages, add_generation_prompt=True)
        assert ours.encode_markup(text).tolist() == wanted["input_ids"]


def test_smollm2_learns_its_answers_and_their_end(models):
    ours = tokenizer_of_folder(models / "smollm2" / "hf")
    turns = encode_chat(ours, MESSAGES[1:3])
    answer = turns.ids[turns.is_answer]
    assert ours.decode(answer) == turns.answers == "Yes."
    assert answer[-1] == ours.eos_id
    assert ours.decode(turns.ids[: turns.is_answer.argmax()]).endswith("assistant\n")


def test_gemma_without_a_template_is_an_error_with_a_remedy(models):
    ours = tokenizer_of_folder(models / "gemma3" / "hf")
    with pytest.raises(ConfigError, match=r"no chat template.*data\.chat_template"):
        render_chat(ours, MESSAGES)
