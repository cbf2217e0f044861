"""Every bad input: one `error:` line, the right exit code, no traceback."""

from __future__ import annotations

import json

import pytest
import small

from llmos_jax.cli.main import main


def run(capsys, *words):
    """Return (exit code, the one error line, stdout)."""
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, printed.err
    assert "Traceback" not in printed.err + printed.out
    message = printed.err[printed.err.index("error:") :]
    return code, message, printed.out


@pytest.fixture
def texts(tmp_path, small_model, text_file):
    return small.overrides(tmp_path / "run", small_model, text_file)


BAD_SETTINGS = {
    "unknown key": (
        "train.step=3",
        2,
        r"unknown key 'train.step'. Did you mean 'steps'",
    ),
    "unknown section": ("trian.steps=3", 2, r"Did you mean 'train'"),
    "wrong type": ("train.steps=many", 2, r'train.steps = "many" has the wrong type'),
    "wrong choice": ("train.compute_dtype=int8", 2, "not one of float32, bfloat16"),
    "not positive": ("train.steps=0", 2, "train.steps is 0; it must be more than 0"),
    "no equals sign": ("train.steps", 2, "not of the form key=value"),
    "unknown model": ("model=smolm2_135m", 2, "Did you mean 'smollm2_135m'"),
    "missing model file": ("model=./nothing.toml", 2, "does not exist"),
    "unknown rules": ("rules=lama", 2, "Did you mean 'llama'"),
    "unknown topology": ("topology=v9z:4", 2, "v9z"),
    "topology not here": ("topology=cpu:4", 1, "4 devices.*8 are here"),
    "seq_len above context": ("batch.seq_len=129", 2, r"longer than the context.*128"),
    "fractional batch": ("batch.per_device=0.3", 2, "keep one"),
    "missing data": ("data.train=/nowhere/text.txt", 2, "does not exist"),
    "no match": ("data.train=/nowhere/*.txt", 2, "no file matches"),
    "missing tokenizer": ("data.tokenizer=/nowhere.json", 2, "cannot be read"),
    "mesh that does not divide": ("plan.mesh.fsdp=3", 3, "3 devices, which does not"),
    "mesh the model cannot": ("plan.mesh.tensor=8", 3, "kv_heads"),
    "unknown mesh axis": ("plan.mesh.tensr=2", 2, "Did you mean 'tensor'"),
    "unknown remat": ("plan.remat=ful", 2, "Did you mean 'full'"),
    "run.dir below a file": ("run.dir=/etc/hostname/run", 2, "cannot be written"),
    "run.dir in /proc": ("run.dir=/proc/run", 2, "cannot be written"),
}


@pytest.mark.parametrize(
    ("setting", "code", "told"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys()
)
def test_train_refuses_a_bad_setting(setting, code, told, texts, capsys, tmp_path):
    import re

    found, message, out = run(capsys, "train", *small.flags([*texts, setting]))
    assert found == code, message
    assert re.search(told, message.replace("\n", " ")), message
    assert out == ""
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("content", [b"", b" \n\n \n"], ids=["nothing", "blank"])
def test_train_refuses_empty_data(content, texts, capsys, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    found, message, _ = run(
        capsys, "train", *small.flags([*texts, f"data.train={path}"])
    )
    assert found == 2 and "no text to learn from" in message


def test_train_refuses_too_little_data(texts, capsys, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("A few words.")
    found, message, _ = run(
        capsys, "train", *small.flags([*texts, f"data.train={path}"])
    )
    assert found == 2 and "batch.seq_len" in message


def test_train_refuses_data_that_is_no_text(texts, capsys, tmp_path):
    path = tmp_path / "image.txt"
    path.write_bytes(bytes(range(128, 256)) * 40)
    found, message, _ = run(
        capsys, "train", *small.flags([*texts, f"data.train={path}"])
    )
    assert found == 2 and "UTF-8" in message


def test_train_refuses_a_tokenizer_larger_than_the_vocabulary(texts, capsys):
    sets = small.flags([*texts, "model=tiny"])
    found, message, _ = run(capsys, "train", *sets)
    assert found == 2
    assert "257 tokens" in message and "tiny has room for 256" in message


def test_train_refuses_a_checkpoint_of_another_model(
    small_run, texts, capsys, tmp_path
):
    import shutil

    shutil.copytree(small_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    other = tmp_path / "other.toml"
    other.write_text(small.MODEL.replace("ffn_dim = 128", "ffn_dim = 64"))
    before = (tmp_path / "run" / "config.toml").read_bytes()
    found, message, _ = run(capsys, "train", *small.flags([*texts, f"model={other}"]))
    assert found == 1 and "ffn_dim 128 against 64" in message
    assert (tmp_path / "run" / "config.toml").read_bytes() == before


def test_train_refuses_a_cache_that_cannot_be_written(texts, capsys, monkeypatch):
    monkeypatch.setenv("LLMOS_CACHE", "/proc/cache")
    found, message, _ = run(capsys, "train", *small.flags(texts))
    assert found == 2 and "LLMOS_CACHE" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('model = "tiny"\nmodell = 1\n', "Did you mean 'model'"),
        ("model = \n", "is not valid TOML"),
        ("[train]\nsteps = 1\n", "'model' is required and missing"),
        ('model = "tiny"\n[train]\nsteps = "1"\n', "train.steps"),
    ],
)
def test_a_bad_config_file_is_named(content, told, tmp_path, capsys):
    path = tmp_path / "config.toml"
    path.write_text(content)
    found, message, _ = run(capsys, "train", path)
    assert found == 2 and told in message and str(path) in message


BAD_WORDS = {
    "unknown verb": (["trian"], 2, "Did you mean 'train'"),
    "unknown flag": (["train", "--stepz", "3"], 2, "--stepz"),
    "unknown config": (["train", "quikstart"], 2, "Did you mean 'quickstart'"),
    "missing config file": (["plan", "./nothing.toml"], 2, "does not exist"),
    "no prompt": (["generate", "runs/x"], 2, "--prompt"),
    "no model to generate": (["generate", "--prompt", "x"], 2, "MODEL"),
    "missing run": (["generate", "/nowhere", "--prompt", "x"], 1, "does not exist"),
    "missing run to score": (["evaluate", "/nowhere"], 1, "does not exist"),
    "missing run to inspect": (["doctor", "/nowhere"], 1, "does not exist"),
    "missing GGUF file": (["generate", "/x.gguf", "--prompt", "x"], 1, "there is no"),
    "nothing to convert": (["convert", "/nowhere", "--out", "/y"], 1, "does not exist"),
    "nowhere to convert to": (["convert", "/nowhere"], 2, "--out"),
    "unknown form": (["convert", "x", "--out", "y", "--to", "onnx"], 2, "onnx"),
    "missing adapter": (
        ["plan", "--set", "model=tiny", "--set", "lora.adapter=/nowhere",
         "--set", "batch.seq_len=8"],
        1,
        "adapter_config.json cannot be read",
    ),
    "unknown LoRA target": (
        ["plan", "--set", "model=tiny", "--set", "lora.rank=2", "--set",
         'lora.targets=["key"]', "--set", "batch.seq_len=8"],
        2,
        "choose among q, k, v",
    ),
    "factors beside nothing": (
        ["train", "--set", "model=tiny", "--set", "lora.rank=2"],
        2,
        "begins with random ones",
    ),
    "bad number": (
        ["generate", "x", "--prompt", "x", "--max-tokens", "y"],
        2,
        "invalid",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "told"), BAD_WORDS.values(), ids=BAD_WORDS.keys()
)
def test_a_bad_command_line_is_one_error(words, code, told, capsys):
    found, message, _ = run(capsys, *words)
    assert found == code and told in message


BAD_WISHES = {
    "prompt too long": (["--prompt", "ab " * 60], "context of 128"),
    "too many tokens": (["--prompt", "a", "--max-tokens", "128"], "context of 128"),
    "no tokens": (["--prompt", "a", "--max-tokens", "0"], "max_tokens"),
    "cold": (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
    "top_p": (["--prompt", "a", "--top-p", "0"], "top_p is 0"),
}


@pytest.mark.parametrize(("words", "told"), BAD_WISHES.values(), ids=BAD_WISHES.keys())
def test_generate_refuses_what_the_model_cannot(words, told, small_run, capsys):
    found, message, _ = run(capsys, "generate", small_run, *words)
    assert found == 2 and told in message


def test_evaluate_refuses_a_missing_text(small_run, capsys):
    words = ["evaluate", small_run, "--set", "data.test=/nowhere.txt"]
    found, message, _ = run(capsys, *words)
    assert found == 2 and "/nowhere.txt does not exist" in message


@pytest.mark.parametrize("verb", ["generate", "evaluate", "convert", "doctor", "plan"])
def test_every_verb_says_what_is_wrong_with_a_foreign_model(verb, tmp_path, capsys):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    words = {
        "generate": ["generate", broken, "--prompt", "x"],
        "convert": ["convert", broken, "--out", tmp_path / "out"],
        "plan": ["plan", "--set", f"model={broken}"],
    }.get(verb, [verb, broken])
    found, message, _ = run(capsys, *words)
    assert found == 1 and str(broken) in message
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_kind_of_model_is_refused_by_its_kind(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    found, message, _ = run(capsys, "generate", tmp_path, "--prompt", "x")
    assert found != 0 and "bert" in message and "llama" in message


def test_an_instruction_without_a_template_is_refused(small_run, capsys):
    found, message, _ = run(capsys, "generate", small_run, "--chat", "--prompt", "x")
    assert found == 2 and "template" in message


def test_a_folder_that_is_no_run_is_told_apart(tmp_path, capsys):
    found, message, _ = run(capsys, "evaluate", tmp_path)
    assert found == 1 and "holds no finished checkpoint" in message


def test_no_feasible_plan_exits_3_with_its_reasons(capsys):
    sets = ["--set", "model=llama3_405b", "--set", "topology=v5e:1x1"]
    found, message, _ = run(capsys, "plan", *sets, "--set", "batch.seq_len=128")
    assert found == 3
    assert "all rejected" in message and "memory" in message


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["plan", "--set", "nothing=1", "--json"], 2),
        (["generate", "/nowhere", "--prompt", "x", "--json"], 1),
        (["plan", "--set", "model=tiny", "--set", "plan.mesh.fsdp=3", "--json",
          "--set", "batch.seq_len=8"], 3),
    ],
)  # fmt: skip
def test_an_error_with_json_is_one_object_too(words, code, capsys):
    found, message, out = run(capsys, *words)
    assert found == code
    assert json.loads(out)["error"] == message.removeprefix("error: ").rstrip("\n")
