"""tools/bench/serve.py's clients count right, and its servers come and go."""

from __future__ import annotations

import asyncio
import importlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

Bench = Callable[[str], ModuleType]
BENCH = Path(__file__).parents[2] / "tools" / "bench"
SERVES = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *parts):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Import a module of tools/bench by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return importlib.import_module


@contextmanager
def stand_in(told: list[bytes], asked: list[dict[str, object]]) -> Iterator[str]:
    """A server that answers every request with these bytes, one write each."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            asked.append(json.loads(self.rfile.read(length)))
            self.send_response(200)
            self.end_headers()
            for part in told:
                self.wfile.write(part)
                self.wfile.flush()

        def log_message(self, *parts: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def event(**body: object) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def answer(tokens: int) -> list[bytes]:
    text = [event(choices=[{"text": "word"}]) for _ in range(4)]
    return [*text, event(usage={"completion_tokens": tokens}), b"data: [DONE]\n\n"]


def test_clients_ask_as_often_as_told_and_never_the_same(bench: Bench) -> None:
    load = bench("serve_load")
    case = load.Case(name="2", clients=2, own=3, shared=5, answer=8)
    asked: list[dict[str, object]] = []
    with stand_in(answer(8), asked) as url:
        found = load.load(url, "model", case, seconds=0, least=3, seed=1)
    assert found.requests == len(asked) == 6
    prompts = [tuple(one["prompt"]) for one in asked]  # type: ignore[arg-type]
    assert len(set(prompts)) == 6
    assert len({prompt[:5] for prompt in prompts}) == 1
    assert {len(prompt) for prompt in prompts} == {8}
    assert all(one["max_tokens"] == 8 and one["ignore_eos"] for one in asked)


@pytest.mark.parametrize("told", [answer(7), answer(8)[:-1], [b'{"error": "no room"}']])
def test_an_answer_that_is_not_whole_is_told(bench: Bench, told: list[bytes]) -> None:
    load = bench("serve_load")
    with stand_in(told, []) as url, pytest.raises(load.LoadFailed, match="8 tokens"):
        asyncio.run(load.ask(url, b"{}", 8))


def test_events_are_counted_that_come_in_pieces(bench: Bench) -> None:
    load = bench("serve_load")
    whole = b"HTTP/1.1 200 OK\r\n\r\n" + b"\n" + b"".join(answer(8))

    async def heard() -> int:
        stream = load._Stream(b"")
        for at in range(0, len(whole), 5):
            stream.data_received(whole[at : at + 5])
        return sum(count for _, count in stream.heard.reads)

    assert asyncio.run(heard()) == 5


def test_figures_are_of_the_time_in_which_all_had_work(bench: Bench) -> None:
    load = bench("serve_load")

    def heard(*times: float) -> object:
        return load.Heard(asked=10.0, reads=[(at, 1) for at in times], tokens=8)

    clients = [[heard(11, 12, 13, 14)], [heard(13, 14, 15, 16)]]
    found = load.figures(clients, 10.0)
    assert found.tokens_per_s == pytest.approx((8 + 4) / 4)
    assert found.first_median_s == pytest.approx(2.0)
    assert found.gap_p95_s == pytest.approx(1.0)
    assert found.requests == 2


def test_a_server_starts_on_a_free_port_and_ends(bench: Bench, tmp_path: Path) -> None:
    servers = bench("serve_servers")
    command = [sys.executable, "-c", SERVES]
    server = servers.start(command, tmp_path / "log", "/ready")
    assert 0 < server.ready_s < servers.START_S
    assert server.cpu_s() >= 0
    server.close()
    assert server.process.returncode == -signal.SIGTERM


def test_a_server_that_dies_says_why(bench: Bench, tmp_path: Path) -> None:
    servers = bench("serve_servers")
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(servers.ServerDied, match="no such model") as died:
        servers.start(command, tmp_path / "log", "/ready")
    assert died.value.status == 1


def test_llama_server_that_dies_of_repacking_goes_on_without(
    bench: Bench, tmp_path: Path
) -> None:
    program = tmp_path / "llama-server"
    dies = "import os, sys\nif '--no-repack' not in sys.argv: os.abort()\n"
    others = "sys.argv.append(sys.argv[sys.argv.index('--port') + 1])\n"
    program.write_text(f"#!{sys.executable}\n{dies}{others}{SERVES}")
    program.chmod(0o755)
    sizes = {"threads": 2, "clients": 4, "context": 256}
    start = bench("serve_servers").start_theirs
    server = start(str(program), tmp_path / "model", tmp_path, **sizes)
    arguments = server.process.args
    server.close()
    assert arguments[arguments.index("-np") + 1] == "4"
    assert int(arguments[arguments.index("-c") + 1]) >= 4 * 256


def test_without_llama_server_it_says_how_to_get_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMOS_LLAMA_SERVER", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["serve.py"])
    with pytest.raises(SystemExit, match=r"^error: .*LLMOS_LLAMA_SERVER"):
        bench("serve").main()


def rows(*rates: float) -> list[dict[str, float]]:
    names = ("first_median_s", "first_p95_s", "gap_p95_s", "requests", "others")
    return [{"tokens_per_s": rate, **dict.fromkeys(names, 0.1)} for rate in rates]


def test_a_summary_has_medians_ratios_and_the_hosts_share(bench: Bench) -> None:
    serve = bench("serve")
    before = dict.fromkeys(
        ("steps", "step_s", "host_s", "generated_tokens", "prefix_hits", "bandwidth"), 0
    )
    after = before | {"steps": 10, "step_s": 0.9, "host_s": 0.1, "bandwidth": 5e9}
    engine = serve.engine_figures(before, after | {"planned_bandwidth": 2e10})
    found = serve.Found(
        turns={"ours": {"16": rows(300, 100, 200)}, "theirs": {"16": rows(80, 100)}},
        ready_s=[3.0, 1.0, 2.0],
        engine={"16": [engine]},
    )
    result = serve.summary(found)
    assert result["clients"]["16"]["ours"] == 200
    assert result["clients"]["16"]["ratio"] == pytest.approx(200 / 90)
    assert result["ready_s"] == 2
    assert result["host_share"] == pytest.approx(0.1)
    assert result["engine"]["16"]["bandwidth_share"] == pytest.approx(0.25)
    shown = serve.table(result | {"cpu": "a CPU", "threads": 2, "rounds": 3})
    assert "2.22" in shown and "10.0%" in shown


def test_a_turn_that_others_disturb_is_repeated_while_patience_lasts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = bench("serve")
    shares = iter([0.0, 0.5, 0.0, 0.02])  # quiet before, others during; then quiet
    monkeypatch.setattr(serve, "_others", lambda server=None: lambda: next(shares))
    monkeypatch.setattr(serve.time, "sleep", lambda seconds: None)
    tried: list[int] = []

    def turn(number: int) -> object:
        tried.append(number)
        return serve.Figures(
            tokens_per_s=1, first_median_s=1, first_p95_s=1, gap_p95_s=1, requests=1
        )

    found = serve.Patience(left_s=60).measure(None, turn)
    assert tried == [0, 1]
    assert found["others"] == 0.02
