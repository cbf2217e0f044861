"""What each verb prints: a text for people, or exactly one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small

from llmos_jax.checkpoint import open_checkpoint
from llmos_jax.cli import Answer, arguments_of, run_verb
from llmos_jax.cli.main import VERBS, main

PLAN_KEYS = {
    "model": {"name", "params", "active_params"},
    "topology": {"name", "chip", "devices", "slices", "hbm_bytes_per_device"},
    "mesh": {"data", "stage", "fsdp", "context", "expert", "tensor"},
    "batch": {"global", "per_device", "microbatches", "seq_len"},
    "predicted": {
        "step_s", "peak_hbm_bytes", "tflops_per_s_per_chip", "mfu", "tokens_per_s",
        "bound_by", "seconds",
    },
    "remat": None, "offload": None, "compiled": None, "runner_up": None,
    "rejected": None, "candidates": None, "search_s": None, "fingerprint": None,
}  # fmt: skip
PLAN = ["plan", "--set", "model=llama3_8b", "--set", "topology=v5e:4x4"]


def answer(capsys, *words):
    """Run a verb that must do; return what it printed on stdout."""
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def one_object(text):
    assert text.endswith("}\n") and text.count("\n") == 1
    return json.loads(text)


def test_plan_json_has_the_keys_of_the_contract(capsys):
    found = one_object(answer(capsys, *PLAN, "--json"))
    assert PLAN_KEYS.keys() <= found.keys()
    assert found.keys() <= PLAN_KEYS.keys() | {"way"}, "additions go to the contract"
    for key, inner in PLAN_KEYS.items():
        assert inner is None or inner <= found[key].keys(), key
    assert found["mesh"].keys() == PLAN_KEYS["mesh"]
    assert found["compiled"] is None
    assert all(item.keys() == {"mesh", "reason"} for item in found["rejected"])
    assert isinstance(found["candidates"], int) and isinstance(found["offload"], list)
    assert found["topology"]["devices"] == 16


def test_plan_text_names_the_choice_and_writes_plan_json(capsys, tmp_path):
    out = tmp_path / "plan.json"
    text = answer(capsys, *PLAN, "--mesh", "fsdp=8,tensor=2", "--out", out, "--params")
    assert "fsdp=8 tensor=2" in text and "layers.attention.q" in text
    written = json.loads(out.read_text())
    assert written["mesh"]["fsdp"] == 8 and "artefact" in written


def test_train_text_says_where_everything_lies(
    capsys, small_run, small_model, text_file
):
    texts = small.overrides(small_run, small_model, text_file)
    text = answer(capsys, "train", *small.flags(texts))
    for part in ("finished in", "bits per byte", "gzip -9", "report", "checkpoint"):
        assert part in text
    assert f"generate {small_run} --prompt" in text


def test_train_json_is_report_json_with_the_figures_of_the_contract(
    capsys, small_run, small_model, text_file
):
    texts = small.overrides(small_run, small_model, text_file)
    found = one_object(answer(capsys, "train", *small.flags(texts), "--json"))
    wanted = {"final_loss", "val_loss", "val_bits_per_byte", "tokens_per_s"}
    assert wanted <= found.keys()
    assert found == json.loads((small_run / "report.json").read_text())
    assert found["final_loss"] == small.losses(small_run)[-1]


def test_the_run_folder_holds_what_the_contract_names(small_run):
    names = {path.name for path in small_run.iterdir()}
    wanted = {
        "config.toml", "plan.json", "metrics.jsonl", "tensorboard", "checkpoints",
        "report.html", "report.json",
    }  # fmt: skip
    assert wanted <= names
    row = json.loads((small_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "tokens_per_s", "step_s", "mfu", "grad_norm", "lr"} <= set(
        row
    )


def test_the_expanded_config_runs_again_as_it_was(small_run):
    from llmos_jax.config import load_config, to_toml

    path = small_run / "config.toml"
    assert to_toml(load_config(str(path)).config) == path.read_text()


def test_evaluate_scores_the_text_that_the_run_held_out(capsys, small_run):
    found = one_object(answer(capsys, "evaluate", small_run, "--json"))
    report = json.loads((small_run / "report.json").read_text())
    assert found["bits_per_byte"] == pytest.approx(
        report["val_bits_per_byte"], rel=1e-6
    )
    assert found["gzip_bits_per_byte"] == report["gzip_bits_per_byte"]
    assert {"perplexity", "accuracy", "tokens", "bytes"} <= found.keys()
    assert (found["model"], found["step"]) == ("small", 20)


def test_evaluate_scores_a_text_of_its_own(capsys, small_run, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    words = ["evaluate", small_run, "--set", f"data.test={path}"]
    found = one_object(answer(capsys, *words, "--json"))
    assert found["bytes"] == path.stat().st_size
    assert found["tokens"] == path.stat().st_size, "one byte, one token; a mark before"
    text = answer(capsys, *words)
    assert "perplexity" in text and "bits per byte" in text


def test_generate_json_has_the_keys_of_the_contract(capsys, small_run):
    words = ["generate", small_run, "--prompt", "The class", "--max-tokens", "5"]
    found = one_object(answer(capsys, *words, "--temperature", "0", "--json"))
    assert found.keys() == {
        "text", "token_ids", "prompt_tokens", "tokens_per_s", "finish_reason",
    }  # fmt: skip
    assert found["prompt_tokens"] == len("The class")
    tokenizer = open_checkpoint(str(small_run)).tokenizer
    assert found["text"] == tokenizer.decode(found["token_ids"])
    assert answer(capsys, *words) == "The class" + found["text"] + "\n"


def test_doctor_checks_this_machine(capsys):
    found = one_object(answer(capsys, "doctor", "--json"))
    assert found["ok"] is True
    assert {"python", "devices", "compiled results", "cache"} <= {
        check["name"] for check in found["checks"]
    }


def test_doctor_says_what_a_run_holds(capsys, small_run):
    text = answer(capsys, "doctor", small_run)
    assert "steps kept" in text and "[10, 20]" in text


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_a_verb_does_and_exits_0(verb, capsys):
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    printed = capsys.readouterr()
    assert left.value.code == 0
    assert f"llmos_jax.{verb}" in printed.out and "--set" in printed.out


def test_llmos_alone_lists_its_verbs(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in VERBS)


def test_what_libraries_print_does_not_reach_stdout(capfd):
    """Python's print and a C library's write alike (Gloo greets on stdout)."""

    def noisy(arguments):
        print("from Python")
        os.write(1, b"from C\n")
        return Answer(text="the answer", json={"the": "answer"})

    assert run_verb(arguments_of("noisy", ""), ["--json"], noisy) == 0
    out, err = capfd.readouterr()
    assert one_object(out) == {"the": "answer"}
    assert "from Python" in err and "from C" in err


def test_a_bug_of_ours_keeps_its_traceback():
    def broken(arguments):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_verb(arguments_of("broken", ""), [], broken)


def test_the_console_script_and_the_module_say_the_same():
    script = "import sys; from llmos_jax.cli.main import main; sys.exit(main())"
    words = [*PLAN, "--json"]
    found = []
    for start in (["-c", script, *words], ["-m", "llmos_jax.plan", *words[1:]]):
        done = subprocess.run(
            [sys.executable, *start],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found.append(one_object(done.stdout)["fingerprint"])
    assert found[0] == found[1]


def test_llmos_is_installed_as_a_command():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"llmos": "llmos_jax.cli.main:main"}
