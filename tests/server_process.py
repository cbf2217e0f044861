"""A real server as a process: started on a small model, asked, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import small

from llmos_jax import __version__, checkpoint, models
from llmos_jax.compression import How, quantize
from llmos_jax.config import load_model
from llmos_jax.data import bytes_tokenizer
from llmos_jax.ir import Quantization

CONTEXT = 2048
SEATS = 4
SETS = {"serve.seats": SEATS, "serve.step_tokens": 16}
"""Few programs: the first start compiles all of them in half a minute."""
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PATH = "/v1/completions"
START_S = 240
"""A cold start on a machine that is busy with other tests."""


def write_model(folder: Path, *, broken: str | None = None) -> Path:
    """Write an int8 model with random weights and the byte tokenizer; return its path.

    It says printable ASCII alone: the other rows of its table are 0. Of the array that
    `broken` names, one number is NaN.
    """
    file = folder / "talker.toml"
    file.write_text(
        small.MODEL.replace("max_seq_len = 128", f"max_seq_len = {CONTEXT}")
    )
    skeleton = models.skeleton(load_model(str(file)))
    how = How(quantization=Quantization())
    made = quantize(skeleton, skeleton.init(jax.random.key(0)), how, ())
    params = {path: np.array(value) for path, value in made.params.items()}
    scale_V = params["embed.table.scale"]
    scale_V[:32] = scale_V[127:] = 0
    if broken is not None:
        params[broken].flat[0] = np.nan
    out = folder / ("broken" if broken else "talker")
    tokenizer = bytes_tokenizer().with_chat_template(TEMPLATE)
    made_by = {"llmos_jax": __version__}
    checkpoint.save_model(str(out), made.skeleton, params, tokenizer, made_by)
    return out


class ServerProcess:
    """A server that runs, or ran."""

    def __init__(self, process: subprocess.Popen[str], folder: Path):
        self.process = process
        self._folder = folder
        self._address = ""

    @property
    def log(self) -> str:
        """What it wrote to stderr so far."""
        return (self._folder / "err").read_text()

    @property
    def address(self) -> str:
        """Its URL; waits until it listens."""
        if not self._address:
            wait_until(lambda: "serving " in self.log or self._is_dead(), START_S)
            assert not self._is_dead(), self.log
            line = next(one for one in self.log.splitlines() if "serving " in one)
            self._address = line.rsplit(" at ", 1)[1].strip()
        return self._address

    def wait_ready(self) -> None:
        """Wait until it takes requests."""
        address = self.address

        def is_ready() -> bool:
            return httpx.get(f"{address}/ready", timeout=30).status_code == 200

        wait_until(lambda: self._is_dead() or is_ready(), START_S)
        assert not self._is_dead(), self.log

    def get(self, path: str) -> httpx.Response:
        """GET."""
        return httpx.get(self.address + path, timeout=30)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        """POST JSON."""
        return httpx.post(self.address + path, json=body, **{"timeout": 60, **more})

    def state(self) -> dict[str, Any]:
        """The engine's gauges and counters."""
        return self.get("/state").json()["state"]

    def wait_idle(self, seconds: float = 30) -> dict[str, Any]:
        """Wait until nothing runs or waits; return the state then."""
        wait_until(lambda: not (self.state()["running"] or self.state()["waiting"]),
                   seconds)  # fmt: skip
        return self.state()

    def stop(self, seconds: float = 60) -> dict[str, Any]:
        """SIGTERM; return what it says on stdout at the end, its exit code with it."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended(seconds)

    def ended(self, seconds: float = 60) -> dict[str, Any]:
        """Wait for its end; return what it says on stdout, its exit code with it."""
        code = self.process.wait(seconds)
        text = (self._folder / "out").read_text()
        return {**(json.loads(text) if text.strip() else {}), "code": code}

    def _is_dead(self) -> bool:
        return self.process.poll() is not None


@contextlib.contextmanager
def started(
    model: Path, folder: Path, *flags: str, **environment: str
) -> Iterator[ServerProcess]:
    """Start a server of a model on one device; it is not ready yet.

    Args:
        model: its folder.
        folder: a new one for what it writes.
        flags: more arguments, after SETS.
        environment: LLMOS_CACHE is the tests' own unless it is here.
    """
    folder.mkdir()
    words = [sys.executable, "-m", "llmos_jax.serve", str(model), "--port", "0"]
    words += [*small.flags([f"{key}={value}" for key, value in SETS.items()]), *flags]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen(
            [*words, "--json"],
            cwd=small.HERE.parent,
            env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment},
            stdout=out,
            stderr=err,
            text=True,
        )
    try:
        yield ServerProcess(process, folder)
    finally:
        process.kill()
        process.wait()


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    """Look again and again; fail when it takes too long."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not so within {seconds} s"
        time.sleep(0.05)


def events_of(text: str) -> list[dict[str, Any]]:
    """The bodies of a stream."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n")]
    return [json.loads(line) for line in lines if line.startswith("{")]


def text_of(text: str, index: int = 0) -> str:
    """What a stream of completions says in one choice."""
    return "".join(
        choice["text"]
        for event in events_of(text)
        for choice in event["choices"]
        if choice["index"] == index
    )
