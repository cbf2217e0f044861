"""lm-eval gets the same answers from us as from its own `hf` model of transformers."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    TQDM_DISABLE="1",
    TOKENIZERS_PARALLELISM="false",
)
pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

from llmos_jax import data, evaluate  # noqa: E402
from llmos_jax.errors import ConfigError, DataError  # noqa: E402
from llmos_jax.harness import LlmosLM  # noqa: E402

torch.set_num_threads(1)

NATS = {"rel": 1e-4, "abs": 1e-2}
"""Float32 through other kernels: a sum of some hundred log-probabilities."""
CONTEXT = 96
SMOLLM2 = Path.home() / ".cache/llmos-models/smollm2/hf"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = [
    ("The capital of France is", [" Paris", " a very large cheese", " Rome"], 0),
    ("Two and two make", [" a pair of trousers", " four", " seven"], 1),
    ("Water freezes into", [" ice", " steam", " a stone bridge"], 0),
    ("The opposite of hot is", [" warm", " cold", " hot"], 1),
    ("At night the sky is", [" green", " dark", " made of wood"], 1),
    ("Bees make", [" honey", " wax and also candles", " cars"], 0),
    ("A week has this many days:", [" five", " ten", " seven"], 2),
    ("Fish live in", [" the water", " trees", " the library"], 0),
]
STORIES = [
    f"{question}{choices[gold]}. Everybody knows it, and number {index} is no other. "
    * (1 + 3 * index)
    for index, (question, choices, gold) in enumerate(QUESTIONS)
]


def written(folder: Path, task: dict[str, Any], documents: list[Any]) -> None:
    """Write a task's YAML (JSON is YAML) and its documents beside it."""
    name = task["task"]
    lines = "\n".join(json.dumps(document) for document in documents)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(json.dumps({**source, **task}))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a task of each kind; what `datasets` makes of it lies there too."""
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield tasks_in(folder)


def tasks_in(folder: Path) -> Path:
    metric = {"aggregation": "mean", "higher_is_better": True}
    choice = {
        "task": "our_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **metric}, {"metric": "acc_norm", **metric}],
    }
    rolling = {
        "task": "our_stories",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    answer = {
        "task": "our_answers",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", **metric}],
    }
    asked = [{"question": q, "choices": c, "gold": g} for q, c, g in QUESTIONS]
    written(folder, choice, asked)
    written(folder, rolling, [{"text": story} for story in STORIES])
    written(folder, answer, asked)
    return folder


def tiny_folder(folder: Path, adds_bos: bool) -> Path:
    """Save a random llama of transformers, with a tokenizer trained on the stories."""
    inner = json.loads(data.train_bpe(STORIES, 384).files()["tokenizer.json"])
    marks = ["<s>", "<|im_start|>", "<|im_end|>"]
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_inner(inner, marks, adds_bos),
        eos_token="<|endoftext|>",
        bos_token="<s>" if adds_bos else None,
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=400,  # some rows are spare, as in real models
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,
            bos_token_id=fast.bos_token_id,
            eos_token_id=fast.eos_token_id,
        )
    )
    made.save_pretrained(folder)
    return folder


def _inner(plain: dict[str, Any], marks: list[str], adds_bos: bool) -> Any:
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(json.dumps(plain))
    inner.add_special_tokens(marks)
    if adds_bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    return inner


@pytest.fixture(scope="module", params=["bos", "no bos"])
def tiny_hf(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_folder(folder, request.param == "bos")


@pytest.fixture(scope="module")
def both(tiny_hf: Path) -> tuple[LlmosLM, Any]:
    """The tiny model as ours, and as lm-eval's own."""
    return LlmosLM(str(tiny_hf)), theirs(tiny_hf)


def theirs(folder: Path, **more: Any) -> Any:
    """lm-eval's own `hf` model, one request at a time: no padding for answers."""
    return HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, **more
    )


def requests(kind: str, *asked: tuple[Any, ...]) -> list[Any]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=index)
        for index, one in enumerate(asked)
    ]


def run(model: Any, folder: Path) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model,
        tasks=["our_choice", "our_stories", "our_answers"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    return found


def responses(found: dict[str, Any], task: str) -> list[Any]:
    rows = sorted(found["samples"][task], key=lambda row: row["doc_id"])
    return [response for row in rows for response in row["filtered_resps"]]


def check_alike(ours: dict[str, Any], hf: dict[str, Any]) -> None:
    """The same accuracies, log-likelihoods and words."""
    assert responses(ours, "our_answers") == responses(hf, "our_answers")
    assert len(set(responses(hf, "our_answers"))) > 1
    choices, expected = (responses(one, "our_choice") for one in (ours, hf))
    assert [bool(greedy) for _, greedy in choices] == [
        greedy in (True, "True") for _, greedy in expected
    ]
    assert [float(nats) for nats, _ in choices] == pytest.approx(
        [float(nats) for nats, _ in expected], **NATS
    )
    for task, metric in (
        ("our_choice", "acc,none"),
        ("our_choice", "acc_norm,none"),
        ("our_stories", "bits_per_byte,none"),
        ("our_answers", "exact_match,none"),
    ):
        got, wanted = (one["results"][task][metric] for one in (ours, hf))
        assert got == pytest.approx(wanted, rel=1e-4)


def test_tasks_come_out_as_with_lm_evals_own_model(both, tasks):
    ours, hf = both
    check_alike(run(ours, tasks), run(hf, tasks))


def test_a_continuation_is_judged_in_whatever_context(both):
    ours, hf = both
    asked = requests(
        "loglikelihood",
        ("", " Paris"),
        ("", STORIES[0]),
        ("The sky is ", "dark"),
        ("A <|im_start|>mark", "<|im_end|>"),
        ("<s>Bees", " make"),
        ("<|endoftext|>Bees", " make"),
        (STORIES[5] * 2, " and that is all"),
        *((STORIES[1][:end], " four") for end in range(3, 20)),
    )
    got, wanted = ours.loglikelihood(asked), hf.loglikelihood(asked)
    assert [one[1] for one in got] == [one[1] for one in wanted]
    assert [one[0] for one in got] == pytest.approx([w[0] for w in wanted], **NATS)


def test_what_the_model_says_itself_is_greedy_and_nothing_else_is(both):
    ours, _ = both
    prompts = [story[:end].rstrip() for story in STORIES for end in (10, 15, 20)]
    one = {"until": [], "max_gen_toks": 1}
    said = ours.generate_until(requests("generate_until", *((p, one) for p in prompts)))
    # Half a character is no text, and a piece of a word may be cut otherwise in it.
    pairs = [
        (prompt, word)
        for prompt, word in zip(prompts, said)
        if ours.tok_encode(prompt + word)[:-1] == ours.tok_encode(prompt)
        and "\ufffd" not in word
    ]
    assert pairs
    others = [(prompt, f"{word}!") for prompt, word in pairs]
    judged = ours.loglikelihood(requests("loglikelihood", *pairs, *others))
    assert [greedy for _, greedy in judged[: len(pairs)]] == [True] * len(pairs)
    assert not all(greedy for _, greedy in judged[len(pairs) :])


def test_documents_longer_than_the_context_are_scored_in_windows(both):
    ours, hf = both
    asked = requests("loglikelihood_rolling", (STORIES[7],), ("",), (STORIES[0],))
    assert len(ours.tok_encode(STORIES[7])) > 2 * CONTEXT
    expected = hf.loglikelihood_rolling(asked)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, **NATS)


def test_an_answer_ends_at_the_first_stop_and_long_prompts_lose_their_beginning(both):
    ours, hf = both
    free = {"until": [], "max_gen_toks": 20}
    asked = [(QUESTIONS[0][0], free), (STORIES[7], free)]
    said = ours.generate_until(requests("generate_until", *asked))
    assert said == hf.generate_until(requests("generate_until", *asked))
    stop = said[0][4:6]
    stopped = requests("generate_until", (asked[0][0], {**free, "until": stop}))
    assert ours.generate_until(stopped) == [said[0].split(stop)[0]]
    assert hf.generate_until(stopped) == [said[0].split(stop)[0]]


@pytest.mark.parametrize(
    "mesh", ["{data=2, tensor=2, fsdp=2}", "{stage=2, data=4}", "{context=2, data=4}"]
)
def test_every_mesh_judges_alike(both, tiny_hf, mesh):
    split = LlmosLM(str(tiny_hf), [f"plan.mesh={mesh}"], max_length=64)
    asked = requests(
        "loglikelihood", *((STORIES[1][:end], " four") for end in range(3, 60, 5))
    )
    got, wanted = split.loglikelihood(asked), both[0].loglikelihood(asked)
    assert [one[0] for one in got] == pytest.approx([w[0] for w in wanted], **NATS)


def test_logits_made_in_pieces_judge_alike(both, tiny_hf, monkeypatch):
    monkeypatch.setattr("llmos_jax.training.evaluate.LOGITS_AT_ONCE", 8 * 400 * 16)
    pieces = LlmosLM(str(tiny_hf), batch_size=8)
    asked = requests(
        "loglikelihood", *((STORIES[1][:end], " four") for end in range(3, 60, 5))
    )
    got, wanted = pieces.loglikelihood(asked), both[0].loglikelihood(asked)
    assert [one[0] for one in got] == pytest.approx([w[0] for w in wanted], **NATS)


SAID = [{"role": "user", "content": "What do bees make? "}]


@pytest.mark.parametrize(
    ("messages", "asks"),
    [
        (SAID, True),
        ([*SAID, {"role": "assistant", "content": "They make "}], False),
        ([{"role": "system", "content": "Be brief."}, *SAID], True),
    ],
)
def test_conversations_are_written_as_lm_evals_own_model_does(both, messages, asks):
    ours, hf = both
    got = ours.apply_chat_template(messages, add_generation_prompt=asks)
    assert got == hf.apply_chat_template(messages, add_generation_prompt=asks)
    assert "bees" in got and ours.tok_encode(got) == hf.tok_encode(got)
    assert ours.chat_template(True) == hf.chat_template(True) == TEMPLATE


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> LlmosLM:
    """A model whose answers nobody compares."""
    return LlmosLM(str(tiny_folder(tmp_path_factory.mktemp("one"), False)))


def test_asked_again_a_sampled_answer_differs(ours):
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", *[("Bees make", settings)] * 2)
    assert len(set(ours.generate_until(asked))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams has no meaning here"),
        ({"max_gen_toks": 200}, "leaves no room for a prompt in 96"),
        ({"max_gen_toks": 0}, "a whole number from 1"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(ours, settings, message):
    with pytest.raises(ConfigError, match=message):
        ours.generate_until(requests("generate_until", ("Bees", settings)))


def test_an_endless_continuation_is_refused(ours):
    with pytest.raises(DataError, match="one of 1 to 96"):
        ours.loglikelihood(requests("loglikelihood", ("Bees", STORIES[7])))


@pytest.mark.parametrize("number", ["auto", 0, 97])
def test_a_length_that_the_model_has_not_is_refused(tmp_path, number):
    folder = tiny_folder(tmp_path, False)
    with pytest.raises(ConfigError, match="from 1 to 96, the model's context"):
        LlmosLM(str(folder), max_length=number)


def test_lm_eval_finds_the_model_by_name(tmp_path, tasks):
    folder = tiny_folder(tmp_path, False)
    found = lm_eval.simple_evaluate(
        "llmos",
        model_args={"model": str(folder), "max_length": 64},
        batch_size=8,
        tasks=["our_choice"],
        limit=2,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None and found["n-samples"]["our_choice"]["effective"] == 2


def test_the_front_door_answers_with_a_table_or_json(tmp_path, tasks, capsys):
    folder = tiny_folder(tmp_path, False)
    words = [str(folder), "--tasks", "our_choice,our_stories", "--limit", "3"]
    words += ["--tasks-from", str(tasks)]
    assert evaluate.main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["documents"] == {"our_choice": 3, "our_stories": 3}
    assert report["tasks"]["our_choice"]["acc"] in (0, 1 / 3, 2 / 3, 1)
    assert 0 < report["tasks"]["our_choice"]["acc_stderr"] < 1
    assert report["tasks"]["our_stories"]["bits_per_byte"] > 1
    assert evaluate.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "metric", "value", "stderr"]
    assert lines[1].split()[:2] == ["our_choice", "acc"]
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "our_choise"], "knows no task 'our_choise'. Did you mean"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "our_choice", "--limit", "0"], "--limit is 0"),
        (["--limit", "3"], "--limit says how --tasks run"),
        (["--tasks", "lost"], "cannot read what its tasks need: .*nowhere"),
        (["--tasks", "x", "--tasks-from", "nowhere"], "nowhere is no folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path, tasks, capsys, monkeypatch, words, message):
    from llmos_jax import harness

    (tasks / "lost.yaml").write_text(
        (tasks / "our_choice.yaml")
        .read_text()
        .replace("our_choice.jsonl", "nowhere.jsonl")
        .replace("our_choice", "lost")
    )
    # All of lm-eval's own tasks take 15 s to list.
    listed = lambda include_path=None, **_: TaskManager(  # noqa: E731
        include_path=include_path, include_defaults=False
    )
    monkeypatch.setattr(harness, "TaskManager", listed)
    folder = str(tiny_folder(tmp_path, False))
    more = ["--tasks-from", str(tasks)] if "--limit" not in words[:1] else []
    more = [] if "--tasks-from" in words else more
    assert evaluate.main([folder, *words, *more]) in (1, 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last)


def test_without_lm_eval_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "llmos_jax.harness")
    monkeypatch.delattr("llmos_jax.harness")
    assert evaluate.main(["anything", "--tasks", "our_choice"]) == 2
    assert "pip install -e .[eval]" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs tools/get-model smollm2")
def test_smollm2_comes_out_as_with_lm_evals_own_model(tasks):
    ours = LlmosLM(str(SMOLLM2), batch_size=8, max_length=256)
    check_alike(run(ours, tasks), run(theirs(SMOLLM2, max_length=256), tasks))
