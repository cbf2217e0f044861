"""Every way to ask `plan`: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import re

import pytest

from llmos_jax import driver
from llmos_jax.cli.main import main
from llmos_jax.planner import plan as search

JOB = ["--set", "model=llama3_8b", "--set", "batch.global=64"]
PLAN = ["plan", *JOB, "--topology", "v6e:4x4"]
FRONT = ["plan", *JOB, "--topology", "any", "--chips", "v5e,v6e", "--max-chips", "16"]


def ask(capsys, *words):
    """(exit code, stdout, stderr)."""
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out, printed.err


def answer(capsys, *words):
    code, out, err = ask(capsys, *words)
    assert code == 0, err
    return out


def one_object(text):
    assert text.endswith("}\n") and text.count("\n") == 1
    return json.loads(text)


@pytest.fixture
def files(capsys, tmp_path):
    """A plan.json and a lock of the same plan, and a plan.json of another."""
    one, other, lock = (tmp_path / name for name in ("a.json", "b.json", "plan.lock"))
    answer(capsys, *PLAN, "--out", one, "--lock", lock, "--json")
    answer(capsys, *PLAN, "--mesh", "tensor=2", "--out", other, "--json")
    return one, other, lock


def test_topology_is_short_for_set_topology(capsys):
    found = one_object(answer(capsys, *PLAN, "--json"))
    assert found["topology"]["name"] == "v6e:4x4"


def test_plan_text_shows_what_lies_one_step_away(capsys):
    text = answer(capsys, *PLAN)
    assert "One step away" in text and "v6e:4x8" in text
    assert all(len(line) <= 88 for line in text.splitlines())


def test_json_does_not_plan_the_neighbours(capsys, monkeypatch):
    import llmos_jax.planner.sensitivity as sensitivity

    def refuse(*_):
        raise AssertionError("neighbours were planned")

    monkeypatch.setattr(sensitivity, "neighbours", refuse)
    assert one_object(answer(capsys, *PLAN, "--json"))["fingerprint"]


def test_a_size_that_cannot_be_names_the_nearest(capsys):
    code, out, err = ask(capsys, *PLAN, "--mesh", "tensor=16")
    assert (code, out) == (3, "")
    head, why, *_ = err.strip().splitlines()
    assert head.startswith("error: no plan for llama3_8b on v6e:4x4")
    assert "kv_heads = 8 is not divisible by tensor=16; nearest: tensor=8" in why


def test_a_pipeline_is_pinned_with_its_schedule(capsys):
    pins = ["--mesh", "stage=2", "--set", "plan.schedule=circular"]
    pins += ["--set", "plan.rounds=4"]
    way = one_object(answer(capsys, *PLAN, *pins, "--json"))["way"]
    assert (way["schedule"], way["rounds"]) == ("circular", 4)
    assert "schedule     circular, 4 rounds, bubble" in answer(capsys, *PLAN, *pins)
    code, _, err = ask(capsys, *PLAN, "--set", "plan.schedule=1f1b")
    assert code == 3 and "means nothing without plan.mesh.stage above 1" in err


def test_html_is_written_beside_either_answer(capsys, tmp_path):
    for extra in ([], ["--json"]):
        path = tmp_path / f"page{len(extra)}.html"
        answer(capsys, *PLAN, "--html", path, *extra)
        assert "llama3_8b on v6e:4x4" in path.read_text()


def test_any_topology_is_a_front(capsys, tmp_path):
    path = tmp_path / "front.html"
    code, out, err = ask(capsys, *FRONT, "--json", "--html", path)
    found = one_object(out)
    assert code == 0 and found["front"] and found["dominated"] >= 0
    assert found["infeasible"] == len(found["infeasible_slices"])
    assert {item["chip"] for item in found["front"]} <= {"v5e", "v6e"}
    assert re.search(r"planning 1 of \d+: v5e:1x1", err)
    assert "which slice?" in path.read_text()


def test_the_front_is_a_table(capsys):
    text = answer(capsys, *FRONT)
    assert "Front of llama3_8b" in text and "$/M tokens" in text


def test_slices_are_joined_on_demand(capsys):
    words = [*FRONT, "--max-slices", "2", "--json"]
    found = one_object(answer(capsys, *words))
    everyone = [item["topology"] for item in found["front"] + found["dominated_slices"]]
    assert any(name.startswith("2*") for name in everyone)


def test_the_user_has_prices_of_their_own(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[usd_per_chip_hour]\nv6e = 1.0\n")
    found = one_object(answer(capsys, *FRONT, "--prices", path, "--json"))
    assert found["prices"]["source"] == str(path)
    costs = {item["chip"]: item["usd_per_hour"] for item in found["front"]}
    assert costs["v6e"] in (1.0, 4.0, 8.0, 16.0)
    assert found["prices"]["missing"] in ([], ["v5e"])


def test_diff_compares_plans_locks_and_runs(capsys, files, tmp_path):
    one, other, lock = files
    found = one_object(answer(capsys, "plan", "--diff", one, other, "--json"))
    assert found["same_decision"] is False and "mesh" in found["choice"]
    assert "the same decision" in answer(capsys, "plan", "--diff", one, lock)
    (tmp_path / "plan.json").write_text(other.read_text())
    assert "another decision" in answer(capsys, "plan", "--diff", lock, tmp_path)


def test_diff_reads_what_json_printed_and_configs(capsys, tmp_path, files):
    printed = tmp_path / "printed.json"
    printed.write_text(answer(capsys, *PLAN, "--json"))
    assert "Nothing differs" in answer(capsys, "plan", "--diff", files[0], printed)
    config = tmp_path / "job.toml"
    config.write_text(
        'model = "llama3_8b"\ntopology = "v6e:4x4"\n[batch]\nglobal = 64\n'
    )
    assert "Nothing differs" in answer(capsys, "plan", "--diff", files[0], config)


def test_what_if_shows_what_a_change_does(capsys):
    words = [*PLAN, "--what-if", "batch.global=128", "--what-if", "plan.remat=full"]
    found = one_object(answer(capsys, *words, "--json"))
    assert found["inputs"]["batch.global"] == {"a": 64, "b": 128, "ratio": 2.0}
    assert "with batch.global=128 plan.remat=full" in answer(capsys, *words)


def test_what_if_nothing_fits_exits_3(capsys):
    code, _, err = ask(capsys, *PLAN, "--what-if", "model=llama3_405b")
    assert code == 3 and "no plan for llama3_405b" in err


def test_a_lock_stands_and_says_so(capsys, files):
    assert answer(capsys, "plan", "--check", files[2]).startswith("Stands: ")
    assert "decision     the same" in answer(capsys, "plan", "--check", files[2])
    found = one_object(answer(capsys, "plan", "--check", files[2], "--json"))
    assert found["ok"] and found["fits"] and found["problems"] == []
    kept = json.loads(files[2].read_text())
    assert kept["versions"]["jax"] and kept["config"]["model"] == "llama3_8b"


def test_a_lock_that_fell_exits_1_with_all_that_moved(capsys, files):
    lock = files[2]
    document = json.loads(lock.read_text())
    document["decision"] = "0" * 16
    document["facts"]["choice"]["mesh"] = "data=16"
    lock.write_text(json.dumps(document))
    code, out, err = ask(capsys, "plan", "--check", lock)
    assert code == 1 and out.startswith("No longer stands: ")
    assert err.splitlines()[-1].startswith("error: ") and "changed: mesh" in err
    code, out, _ = ask(capsys, "plan", "--check", lock, "--json")
    found = one_object(out)
    assert code == 1 and not found["ok"] and "changed: mesh" in found["error"]


def test_a_lock_that_fits_nowhere_exits_1(capsys, files):
    lock = files[2]
    document = json.loads(lock.read_text())
    document["config"]["model"] = "llama3_405b"
    lock.write_text(json.dumps(document))
    code, _, err = ask(capsys, "plan", "--check", lock)
    assert code == 1 and "no longer fits: no plan for llama3_405b" in err


def test_a_fidelity_is_passed_on(capsys, monkeypatch, files):
    asked = []

    def pretend(config, verify="estimate"):
        asked.append(verify)
        found = search(
            _table(config),
            config.topology or "v6e:4x4",
            _work(config),
            "llama",
        )
        return found.with_compiled(
            {
                "fidelity": verify, "peak_hbm_bytes": 2e10, "argument_bytes": 1e9,
                "temp_bytes": 1e9, "compile_s": 1.0, "jax": "1", "libtpu": "2",
                "collectives": [], "unplanned_collectives": [],
            }
        )  # fmt: skip

    monkeypatch.setattr(driver, "plan", pretend)
    lock = files[2]
    found = one_object(
        answer(capsys, *PLAN, "--verify", "probe", "--lock", lock, "--json")
    )
    assert found["compiled"]["fidelity"] == "probe"
    assert json.loads(lock.read_text())["fidelity"] == "probe"
    answer(capsys, "plan", "--check", lock)
    answer(capsys, "plan", "--check", lock, "--verify", "compile")
    assert asked == ["probe", "probe", "compile"]


def _table(config):
    from llama_table import table_of

    return table_of(config.model)


def _work(config):
    from llmos_jax.ir import Workload

    return Workload(global_batch=config.batch.global_, seq_len=config.batch.seq_len)


MISUSES = {
    "two questions": (["--diff", "a", "b", "--check", "c"], "two questions"),
    "any and what-if": (["--topology", "any", "--what-if", "a=1"], "two questions"),
    "chips without any": ([*JOB, "--chips", "v5e"], "belongs to --topology any"),
    "max-chips without any": ([*JOB, "--max-chips", "8"], "--max-chips does not go"),
    "prices without any": ([*JOB, "--prices", "x"], "--prices does not go with"),
    "lock of a front": ([*FRONT[1:], "--lock", "x"], "--lock does not go with"),
    "out of a diff": (["--diff", "a", "b", "--out", "x"], "--out does not go with"),
    "html of a check": (["--check", "a", "--html", "x"], "--html does not go with"),
    "config and diff": (["quickstart", "--diff", "a", "b"], "CONFIG does not go"),
    "set and check": ([*JOB, "--check", "a"], "--set does not go with --check"),
    "verify a front": ([*FRONT[1:], "--verify", "probe"], "--verify does not go"),
    "unknown fidelity": ([*PLAN[1:], "--verify", "prob"], "Did you mean 'probe'"),
    "unknown chip": ([*FRONT[1:], "--chips", "v6"], "v6"),
    "no chip": ([*FRONT[1:], "--chips", ","], "names no chip"),
    "no number": ([*FRONT[1:], "--max-chips", "many"], "whole number from 1"),
    "zero slices": ([*FRONT[1:], "--max-slices", "0"], "whole number from 1"),
    "batch per device": (
        ["--set", "model=llama3_8b", "--topology", "any", "--set",
         "batch.per_device=2"],
        "--set batch.global=",
    ),
    "no batch": (
        ["--set", "model=llama3_8b", "--topology", "any"], "--set batch.global=",
    ),
    "missing prices": ([*FRONT[1:], "--prices", "./none.toml"], "does not exist"),
    "one side of a diff": (["--diff", "a"], "expected 2 arguments"),
    "missing side": (["--diff", "./a.json", "./b.json"], "a.json does not exist"),
    "unknown side": (["--diff", "quikstart", "quickstart"], "Did you mean 'quick"),
    "missing lock": (["--check", "./none.lock"], "cannot be read"),
    "what if nothing": ([*PLAN[1:], "--what-if", "batch"], "not of the form key=value"),
    "what if unknown": ([*PLAN[1:], "--what-if", "bach.global=1"], "Did you mean"),
    "html nowhere": ([*PLAN[1:], "--html", "/nowhere/x.html"], "--html /nowhere/x"),
    "lock nowhere": ([*PLAN[1:], "--lock", "/nowhere/x"], "cannot be written"),
    "out nowhere": ([*PLAN[1:], "--out", "/nowhere/x"], "--out /nowhere/x"),
    "unknown topology": ([*JOB, "--topology", "v9z:4"], "v9z"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "told"), MISUSES.values(), ids=MISUSES.keys())
def test_a_misuse_is_one_error_and_exit_2(words, told, capsys):
    code, out, err = ask(capsys, "plan", *words)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and told in err, err
    assert out == ""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "no plan: 'model' is missing"),
        ('{"artefact": {"version": 99}}', "no plan: 'model' is missing"),
        ('{"decision": "x"}', "PlanLock cannot be read"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(content, told, capsys, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    code, _, err = ask(capsys, "plan", "--diff", path, path)
    assert code == 2 and told in err


def test_a_plan_of_another_release_is_read_as_far_as_it_goes(capsys, files):
    document = json.loads(files[1].read_text())
    document["artefact"]["version"] = 99
    files[1].write_text(json.dumps(document))
    found = one_object(answer(capsys, "plan", "--diff", *files[:2], "--json"))
    assert "mesh" in found["choice"] and found["specs"] == {}


def test_no_slice_at_all_exits_3(capsys):
    words = [*FRONT, "--set", "model=llama3_405b", "--max-chips", "4"]
    code, _, err = ask(capsys, *words)
    assert code == 3 and "on any of" in err and "a larger --max-chips" in err


def test_a_plan_is_no_lock_and_an_empty_folder_no_run(capsys, files, tmp_path):
    code, _, err = ask(capsys, "plan", "--check", files[0])
    assert code == 2 and "is no lock" in err
    (tmp_path / "empty").mkdir()
    code, _, err = ask(capsys, "plan", "--diff", tmp_path / "empty", files[0])
    assert code == 2 and "holds no plan.json" in err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[usd_per_chip_hour]\nv6e = 0\n", "v6e is 0.0; it must be more than 0"),
        ('[usd_per_chip_hour]\nv6e = "dear"\n', "wrong type"),
        ("[usd_per_chip_hour]\nv66e = 1\n", "v66e"),
        ("[prices]\nv6e = 1\n", "unknown key 'prices'"),
        ('source = "me"\n', "'usd_per_chip_hour' is required"),
    ],
)
def test_a_bad_price_list_is_refused(content, told, capsys, tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text(content)
    code, _, err = ask(capsys, *FRONT, "--prices", path)
    assert code == 2 and told in err
