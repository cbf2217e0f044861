"""The vocabulary inside a GGUF file cuts text as the model's own tokenizer does."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from llmos_jax.data import Tokenizer
from llmos_jax.data.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    merges_of_scores,
    pre_tokenizer_of,
    tokenizer_of_gguf,
)
from llmos_jax.errors import CheckpointError, ConfigError
from llmos_jax.interchange.gguf_file import GgufFile
from llmos_jax.interchange.gguf_vocabulary import fields_of_tokenizer

MODELS = Path("~/.cache/llmos-models").expanduser()
ODD = [
    "  12 spaces   345",
    " \n\n\n  x\t\ty  \r\n\r\nz",
    "\U0001f600\U0001f469\u200d\U0001f467 \u00e9 \u6f22\u5b57",
    "\u0627\u0644 \u0663 \u216b  \u00bd",
    "\n" * 40 + "\t" * 40 + " " * 50 + "a",
    "don't I'LL we've 1234567",
    "<b>hi</b></td> <table> \u2581\u2581 \ufffd\x00\x01\u00a0",
    "def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\n",
    "",
]


def _texts() -> list[str]:
    from pydoc_data.topics import topics

    rng = random.Random(0)
    kinds = [
        lambda: rng.randrange(32, 127),
        lambda: rng.randrange(32, 0x3000),
        lambda: ord(rng.choice(" \n\t0123456789")),
    ]
    noise = ["".join(chr(rng.choice(kinds)()) for _ in range(100)) for _ in range(200)]
    return [*ODD, *list(topics.values())[:40], Path(__file__).read_text(), *noise]


@functools.cache  # seconds, for Gemma's 262144 tokens
def _real(name: str) -> tuple[Tokenizer, str]:
    folder = MODELS / name
    if not (folder / "hf" / "tokenizer.json").is_file():
        pytest.skip(
            f"no {folder}/hf; `tools/get-model {name}` and transformers make it"
        )
    page = (folder / "hf" / "tokenizer.json").read_text(encoding="utf-8")
    return GgufFile(folder / "model.gguf").tokenizer(), page


@pytest.mark.parametrize(
    "name", ["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)]
)
def test_ids_are_those_of_transformers(name: str) -> None:
    ours, page = _real(name)
    if name == "smollm2":
        # transformers leaves out what `smollm` means: digits stand alone.
        plain = json.loads(page)
        steps = [{"type": "Digits", "individual_digits": True}, plain["pre_tokenizer"]]
        plain["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        page = json.dumps(plain)
    theirs = Tokenizer.from_json(page)
    assert ours.vocabulary() == theirs.vocabulary()
    for text in _texts():
        ids = ours.encode(text)
        assert np.array_equal(ids, theirs.encode(text)), text[:80]
        assert ours.decode(ids) == theirs.decode(ids)
    markup = "<|im_start|>user\nhi<|im_end|>\n<bos>x<eos><start_of_turn>"
    assert np.array_equal(ours.encode_markup(markup), theirs.encode_markup(markup))


def test_gemma_wants_its_first_mark_and_smollm_none() -> None:
    gemma, smollm = _real("gemma3")[0], _real("smollm2")[0]
    assert gemma.marks.adds_bos and gemma.encode_prompt("hi")[0] == gemma.marks.bos_id
    assert not smollm.marks.adds_bos and smollm.marks.stop_ids == {2}
    assert "<|im_start|>" in str(smollm.marks.chat_template)


@pytest.mark.parametrize(
    "name", ["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)]
)
def test_a_real_vocabulary_written_again_is_the_same(name: str) -> None:
    first, _ = _real(name)
    fields = fields_of_tokenizer(first, first.vocab_size)
    again = tokenizer_of_gguf({"general.architecture": name, **fields})
    assert (
        fields.get("tokenizer.ggml.pre")
        == {
            "smollm2": "smollm",
            "gemma3": "default",
        }[name]
    )
    assert again.marks == first.marks
    for text in _texts()[:60]:
        assert np.array_equal(first.encode(text), again.encode(text)), text[:80]


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("gpt-2", ["a", " ", " 1234", " don", "'t", "!", "\n"]),
        ("llama-bpe", ["a", " ", " ", "123", "4", " don", "'t", "!\n"]),
        ("qwen2", ["a", " ", " ", "1", "2", "3", "4", " don", "'t", "!\n"]),
        ("smollm", ["a", "  ", "1", "2", "3", "4", " don", "'t", "!", "\n"]),
        ("default", ["a", " ", " ", "123", "4", " don", "'", "t", "!", "\n"]),
    ],
)
def test_each_rule_cuts_as_its_model_does(rule: str, pieces: list[str]) -> None:
    text = "a  1234 don't!\n"
    cut = pre_tokenizer_of(rule).pre_tokenize_str(text)
    spans = [text[start:stop] for _, (start, stop) in cut]
    assert spans == pieces


def test_the_rules_are_those_of_published_tokenizers() -> None:
    mapping = pytest.importorskip(
        "transformers.integrations.gguf.gguf_tokenizer_mapping"
    )
    for rule in ("llama-bpe", "qwen2"):
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizer_of(rule)
        steps = json.loads(inner.to_str())["pre_tokenizer"]["pretokenizers"]
        wanted = mapping.GGUF_PRE_TOKENIZER_SPLITS[rule]
        assert steps[0]["pattern"] == {"Regex": wanted}


@pytest.mark.parametrize("rule", ["llama-bpe", "qwen2", "smollm", "gpt-2", "default"])
def test_a_rule_is_recognized_when_it_is_written(rule: str) -> None:
    fields = _byte_level(**{"tokenizer.ggml.pre": rule})
    tokenizer = tokenizer_of_gguf(fields)
    again = fields_of_tokenizer(tokenizer, tokenizer.vocab_size)
    for key in ("pre", "tokens", "token_type", "merges", "eos_token_id"):
        assert again[f"tokenizer.ggml.{key}"] == fields[f"tokenizer.ggml.{key}"], key


def test_best_tokens_are_merged_first() -> None:
    tokens = ["a", "b", "c", "ab", "bc", "abc"]
    assert merges_of_scores(tokens, [0, 0, 0, -2, -1, -3]) == [
        ("b", "c"),
        ("a", "b"),
        ("ab", "c"),
        ("a", "bc"),
    ]


def test_sentencepiece_text_gets_a_space_in_front_and_bytes_for_the_rest() -> None:
    tokenizer = tokenizer_of_gguf(_sentencepiece())
    names = {index: name for name, index in tokenizer.vocabulary().items()}
    ids = tokenizer.encode("ab b\u00e9")
    assert [names[int(one)] for one in ids] == [
        "\u2581ab",
        "\u2581",
        "b",
        "<0xC3>",
        "<0xA9>",
    ]
    assert tokenizer.decode(ids) == "ab b\u00e9"
    assert tokenizer.encode_prompt("b")[0] == 1
    plain = tokenizer_of_gguf(
        _sentencepiece(**{"tokenizer.ggml.add_space_prefix": False})
    )
    assert names[int(plain.encode("ab")[0])] == "ab"


def test_sentencepiece_written_again_is_the_same() -> None:
    first = tokenizer_of_gguf(_sentencepiece())
    fields = fields_of_tokenizer(first, first.vocab_size)
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    kinds = _sentencepiece()["tokenizer.ggml.token_type"]
    assert fields["tokenizer.ggml.token_type"] == kinds
    again = tokenizer_of_gguf(fields)
    for text in ("ab b\u00e9 ", "  a", "<x>ab", "</s>"):
        assert np.array_equal(first.encode(text), again.encode(text))


def test_whole_tokens_are_taken_whole_and_marks_as_text() -> None:
    tokenizer = tokenizer_of_gguf(_sentencepiece())
    assert tokenizer.vocabulary()["<x>"] in tokenizer.encode("a<x>b")
    assert 2 not in tokenizer.encode("a</s>")
    assert 2 in tokenizer.encode_markup("a</s>")


def test_a_turn_s_end_stops_where_the_template_writes_it() -> None:
    fields = _byte_level()
    assert tokenizer_of_gguf(fields).marks.stop_ids == {0}
    fields["tokenizer.chat_template"] = "{{ messages[0].content }}<|im_end|>"
    assert tokenizer_of_gguf(fields).marks.stop_ids == {0, 1}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", None, "tokenizer.ggml.model is missing"),
        ("model", "rwkv", "'rwkv' one .* `gpt2` .* `llama`"),
        ("pre", "poro-chat", "rule 'poro-chat' .* known are llama-bpe"),
        ("token_type", [1, 2], "types of 2"),
        ("merges", ["ab"], "the merge 'ab': no pair"),
        ("merges", ["\u1234 x"], "makes no sense"),
        ("eos_token_id", 99999, "names token 99999"),
    ],
)
def test_a_broken_tokenizer_is_refused(key: str, value: Any, said: str) -> None:
    fields = _byte_level(**{f"tokenizer.ggml.{key}": value})
    if value is None:
        del fields[f"tokenizer.ggml.{key}"]
    with pytest.raises(ConfigError, match=said):
        tokenizer_of_gguf(fields)


def test_a_file_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for add in (
        *(writer.add_context_length, writer.add_embedding_length),
        *(writer.add_block_count, writer.add_feed_forward_length),
        *(writer.add_head_count, writer.add_head_count_kv),
    ):
        add(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((4, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="a.gguf: the file holds no tokenizer"):
        GgufFile(tmp_path / "a.gguf").tokenizer()


def _byte_level(**changes: Any) -> dict[str, Any]:
    symbols = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokens = ["<|endoftext|>", "<|im_end|>", *sorted(symbols), "th", "the"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.eos_token_id": 0,
        **changes,
    }


def _sentencepiece(**changes: Any) -> dict[str, Any]:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    made = ["ab", "\u2581ab", "<x>", "\u2581", "a", "b", "<", "/", "s", ">", "x"]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *made]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(made)]
    kinds[tokens.index("<x>")] = USER_DEFINED
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(at) for at in range(len(made))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **changes,
    }
