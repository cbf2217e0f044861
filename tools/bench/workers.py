"""Keep one process of each contender at work, and let them take turns.

Not a bench of its own. A request is a line of JSON on the worker's stdin, its answer
one on stdout, so contenders may run under different Pythons; nothing is loaded twice.
What a library prints goes to stderr.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

HOW = (
    "python3 -m venv P && P/bin/pip install llama-cpp-python==0.3.36 torch==2.13.0 "
    "transformers gguf ctranslate2; export LLMOS_PEERS_PYTHON=P/bin/python"
)


class WorkerDied(Exception):
    """A worker ended before it answered."""


class Worker:
    """A process that answers requests one by one."""

    def __init__(self, *command: str):
        self._name = " ".join(os.path.basename(part) for part in command)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """What the worker's action `do` returns.

        Raises:
            WorkerDied: it ended instead.
        """
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None and answers is not None
        try:
            requests.write(json.dumps({"do": do, **arguments}) + "\n")
            requests.flush()
        except BrokenPipeError:
            pass  # its exit status says more
        line = answers.readline()
        if not line:
            status = self._process.wait()
            raise WorkerDied(f"{self._name} ended with status {status} at {do!r}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(actions: dict[str, Callable[..., Any]]) -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        made = actions[request.pop("do")](**request)
        answers.write(json.dumps(made) + "\n")
        answers.flush()


def peers_python(*modules: str) -> str | None:
    """The Python that has all these modules; None, and a line that says so, if there
    is none."""
    python = os.environ.get("LLMOS_PEERS_PYTHON")
    if python:
        code = f"import importlib.util as u; all(map(u.find_spec, {modules})) or 1 / 0"
        try:
            done = subprocess.run([python, "-c", code], capture_output=True)
            has_them = done.returncode == 0
        except OSError:
            has_them = False
    else:
        python = sys.executable
        has_them = all(map(importlib.util.find_spec, modules))
    if not has_them:
        names = " and ".join(modules)
        note(f"{python} has no {names}, whose figures are left out. To have it: {HOW}")
    return python if has_them else None


def note(text: str) -> None:
    """Say how things go, apart from the result."""
    print(text, file=sys.stderr, flush=True)
