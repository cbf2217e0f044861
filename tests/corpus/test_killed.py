"""kill -9 in the middle: the same command goes on, and ends as if nothing had been."""

from __future__ import annotations

import json
import signal
import time

import preparing
import psutil
import pytest
import small

PREPARE = (
    "import sys\n"
    "from llmos_jax import driver\n"
    "from llmos_jax.config import load_config\n"
    "driver.prepare(load_config('quickstart', sys.argv[1:]).config)\n"
)


def options(out, model, patterns):
    return preparing.settings(
        out, model, *patterns, prepare__test_share=0.1, prepare__shard_tokens=20_000
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Eight units, since each pattern is one."""
    folder = tmp_path_factory.mktemp("killed")
    return [
        preparing.write_rows(
            folder / f"{number}.jsonl",
            [preparing.prose(number * 1000 + seed, 90) for seed in range(250)],
        )
        for number in range(8)
    ]


@pytest.fixture(scope="module")
def straight(sources, small_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpora") / "straight"
    report = preparing.driver.prepare(
        small.config_of(options(out, small_model, sources))
    )
    return out, report


def journal(out):
    path = out / ".work" / "journal.jsonl"
    raw = path.read_text() if path.exists() else ""
    return [
        json.loads(line) for line in raw.splitlines(keepends=True) if line[-1] == "\n"
    ]


def kill_when(process, out, kind, count):
    """Kill it when the journal has so many entries of a kind; return its children."""
    for _ in range(6000):
        done = [line for line in journal(out)[1:] if line["key"][0] == kind]
        if len(done) >= count:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
            process.wait()
            return children
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError(f"no {count} {kind}s were finished")


@pytest.mark.parametrize("kind, count", [("unit", 3), ("shard", 3), ("shard", 12)])
def test_a_killed_run_goes_on(kind, count, straight, sources, small_model, tmp_path):
    out = tmp_path / "out"
    words = options(out, small_model, sources)
    process = small.start(["-c", PREPARE, *words])
    children = kill_when(process, out, kind, count)
    assert not (out / "manifest.json").exists()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "workers outlive who started them"
    done = [line["key"] for line in journal(out)[1:]]
    shards = {
        out / f"{key[1]}-{key[2]:05d}.array_record" for key in done if key[0] == "shard"
    }
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}
    with (out / ".work" / "journal.jsonl").open("ab") as file:
        file.write(b'{"key": ["shard", "train", 9')  # a line that was cut short
    report = preparing.driver.prepare(small.config_of(words))
    after = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}
    assert before == after
    assert report["resumed"] == {
        "units": sum(key[0] == "unit" for key in done), "shards": len(shards)
    }  # fmt: skip
    whole, undisturbed = straight
    assert report["total"] == undisturbed["total"]
    assert {path.name for path in out.iterdir()} == {
        path.name for path in whole.iterdir()
    }
    for path in whole.iterdir():
        if path.name != "report.json":
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_a_worker_that_is_killed_is_told(sources, small_model, tmp_path):
    out = tmp_path / "out"
    code = f"import sys; sys.argv[1:] = {options(out, small_model, sources)!r}\n"
    code += (
        "import multiprocessing, os, signal, threading, time\n"
        "import psutil\n"
        "def strike():\n"
        "    while True:\n"
        "        for one in psutil.Process().children(recursive=True)[2:]:\n"
        "            one.kill()\n"
        "        time.sleep(0.02)\n"
        "threading.Thread(target=strike, daemon=True).start()\n"
    )
    code += (
        "from llmos_jax.errors import DataError\n"
        "from llmos_jax import driver\n"
        "from llmos_jax.config import load_config\n"
        "try:\n"
        "    driver.prepare(load_config('quickstart', sys.argv[1:]).config)\n"
        "except DataError as problem:\n"
        "    print(problem)\n"
    )
    process = small.start(code)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "a worker process was killed" in printed
