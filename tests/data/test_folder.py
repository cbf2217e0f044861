"""Tokenizers of Hugging Face folders: the marks, and the way back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tokenizers

from llmos_jax.data import Tokenizer, bytes_tokenizer, tokenizer_of_folder
from llmos_jax.errors import ConfigError

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

TEXTS = ("", "a", " hello  world\n", "Grüße 你好 🙂", "<s>x</s><|im_end|><bos>")


@pytest.fixture
def folder(tmp_path):
    inner = tokenizers.Tokenizer.from_str(bytes_tokenizer()._inner.to_str())
    inner.add_special_tokens(["<s>", "</s>", "<|turn|>"])  # 257, 258, 259
    (tmp_path / "tokenizer.json").write_text(inner.to_str())
    return tmp_path


def write(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


CONFIG = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "tokenizer_class": "TokenizersBackend",
}


def test_the_files_of_the_folder_say_the_marks(folder):
    write(
        folder,
        tokenizer_config=CONFIG,
        generation_config={"eos_token_id": [258, 259], "bos_token_id": 3},
    )
    marks = tokenizer_of_folder(folder).marks
    assert (marks.bos_id, marks.eos_id, marks.adds_bos) == (257, 258, False)
    assert marks.stop_ids == {258, 259}
    assert marks.config == CONFIG


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": {"content": "<|turn|>"}}},
        {"special_tokens_map": {"eos_token": "<|turn|>"}},
        {"generation_config": {"eos_token_id": 259}},
        {"config": {"eos_token_id": [259]}},
    ],
)
def test_the_end_mark_is_found_wherever_it_is_named(folder, files):
    write(folder, **files)
    assert tokenizer_of_folder(folder).eos_id == 259


def test_without_any_other_file_the_names_decide(folder):
    assert tokenizer_of_folder(folder).eos_id == 256
    assert tokenizer_of_folder(folder).marks.bos_id is None


TEMPLATES = [
    ({"chat_template": "one"}, None, "one"),
    ({"chat_template": "one"}, "two", "two"),
    (
        {
            "chat_template": [
                {"name": "tool_use", "template": "x"},
                {"name": "default", "template": "three"},
            ]
        },
        None,
        "three",
    ),
    ({"chat_template": [{"name": "rag", "template": "x"}]}, None, None),
    ({}, None, None),
]


@pytest.mark.parametrize(("config", "jinja", "wanted"), TEMPLATES)
def test_the_chat_template_is_found(folder, config, jinja, wanted):
    write(folder, tokenizer_config={**CONFIG, **config})
    if jinja:
        (folder / "chat_template.jinja").write_text(jinja)
    tokenizer = tokenizer_of_folder(folder)
    assert tokenizer.marks.chat_template == wanted
    assert "chat_template" not in tokenizer.marks.config


ADDS = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_bos_token": False},
    {"add_eos_token": True},
]
"""Beside a tokenizer.json they say nothing, since release 5 of transformers."""


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("processor", [False, True])
def test_a_prompt_is_framed_as_transformers_does(folder, adds, processor):
    transformers = pytest.importorskip("transformers")
    if processor:
        plain = json.loads((folder / "tokenizer.json").read_text())
        inner = tokenizers.Tokenizer.from_str(json.dumps(plain))
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=["<s>", "$A"],
            pair=["<s>", "$A", "$B"],
            special_tokens=[("<s>", 257)],
        )
        (folder / "tokenizer.json").write_text(inner.to_str())
    write(folder, tokenizer_config={**CONFIG, **adds})
    ours = tokenizer_of_folder(folder)
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        wanted = peer(text, split_special_tokens=True).input_ids
        assert ours.encode_prompt(text).tolist() == wanted
        wanted = peer(text, add_special_tokens=False).input_ids
        assert ours.encode_markup(text).tolist() == wanted
    assert ours.marks.adds_bos == processor
    assert ours.begin_id == (257 if ours.marks.adds_bos else 258)
    again = Tokenizer.from_json(ours.to_json())
    assert again.marks == ours.marks
    assert again.encode_prompt("a").tolist() == ours.encode_prompt("a").tolist()


def test_exported_files_are_the_same_folder_again(folder, tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    config = {**CONFIG, "pad_token": "<|turn|>"}
    write(folder, tokenizer_config={**config, "chat_template": "{{ messages }}"})
    ours = tokenizer_of_folder(folder)
    out = tmp_path_factory.mktemp("out")
    for name, text in ours.files().items():
        (out / name).write_text(text)
    assert "llmos" not in json.loads((out / "tokenizer.json").read_text())
    assert tokenizer_of_folder(out).marks == ours.marks
    peer = transformers.AutoTokenizer.from_pretrained(out)
    assert (peer.bos_token, peer.eos_token, peer.pad_token) == (
        "<s>",
        "</s>",
        "<|turn|>",
    )
    assert peer.chat_template == "{{ messages }}"
    assert peer("a b").input_ids == ours.encode_prompt("a b").tolist()


def test_a_tokenizer_made_here_is_exported_for_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = bytes_tokenizer()
    for name, text in ours.files().items():
        (tmp_path / name).write_text(text)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert peer("é x").input_ids == ours.encode("é x").tolist()
    assert peer.eos_token_id == ours.eos_id
    assert tokenizer_of_folder(tmp_path).eos_id == ours.eos_id


def test_what_checkpoints_of_earlier_releases_hold_is_read():
    plain = bytes_tokenizer()._inner.to_str()
    assert Tokenizer.from_json(plain).marks == bytes_tokenizer().marks
    stored = json.loads(bytes_tokenizer().to_json())
    stored["llmos"].pop("eos_id")
    with pytest.raises(ConfigError, match="marks cannot be read"):
        Tokenizer.from_json(json.dumps(stored))


def test_errors_name_the_file(folder, tmp_path):
    write(folder, tokenizer_config={"eos_token": "<nope>"})
    with pytest.raises(ConfigError, match="eos_token = '<nope>', and the vocabulary"):
        tokenizer_of_folder(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: not JSON"):
        tokenizer_of_folder(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="wanted a JSON object"):
        tokenizer_of_folder(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer\.json"):
        tokenizer_of_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer: wanted tokenizer\.json"):
        tokenizer_of_folder(folder)


@pytest.mark.parametrize(
    "name", ["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)]
)
def test_the_real_models_are_read_as_transformers_reads_them(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = Path.home() / ".cache" / "llmos-models" / name / "hf"
    if not folder.is_dir():
        pytest.skip("the real models are not here: tools/get-model fetches them")
    ours = tokenizer_of_folder(folder)
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.marks.bos_id, ours.eos_id) == (peer.bos_token_id, peer.eos_token_id)
    for text in (*TEXTS, json.__doc__, "<start_of_turn>user\n\n\n  x<unused0>"):
        wanted = peer(text, split_special_tokens=True).input_ids
        assert ours.encode_prompt(text).tolist() == wanted
        assert (
            ours.encode_markup(text).tolist()
            == peer(text, add_special_tokens=False).input_ids
        )
