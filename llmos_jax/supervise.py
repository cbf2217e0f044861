"""Keep a training run going: start it, watch it, start it again (`train --supervise`).

The run is a process of its own, and this one imports no jax: it cannot hang in a
collective, and a crash of XLA does not take it along. It knows the run by its exit code
and by its heartbeat (telemetry/heartbeat.py).

    exit 0, 2, 3       passed on: done, a wrong config, no plan
    exit 1, a signal   started again after a pause that doubles, with jitter
    no step in time    its stacks are kept, it is ended, and started again

A run that fails `supervise.restarts` times in a row, each time without having gone on
from a later checkpoint than before, is given up; one that fails by itself, as a loss
that is not a number does, is tried once more only, for it would fail again.

Of several processes (hosts) each has a supervisor of its own: when one process is gone,
all others end within seconds (lowering/peers.py), and all supervisors start theirs.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmos_jax.config import RunConfig
from llmos_jax.errors import TrainingError
from llmos_jax.telemetry.heartbeat import (
    EVERY_S,
    VARIABLE,
    read_heartbeat,
    stack_path,
)

_PASSED_ON = (0, 2, 3)
_KILLED = 128
"""Exit codes above it are a signal's, as shells count them."""
_WOULD_REPEAT = ("TrainingError", "PlanMismatch", "DoesNotFit")
"""Errors that lie in the run, not in the machine."""
_LONGEST_PAUSE_S = 300.0
_MORE_TIME = 10.0
"""How much longer than a step all else may take: starting, compiling, saving."""
_LOOK_S = 0.1
_STACK_S = 1.0
"""For writing stacks; both are judgements."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How the last process ended: what is passed on."""

    code: int
    stdout: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """Why a process failed, as people read it, and what is judged."""

    text: str
    would_repeat: bool
    resumed_from: int | None


class Supervisor:
    """One run's keeper."""

    def __init__(
        self, command: Sequence[str], config: RunConfig, say: Callable[[str], None]
    ):
        """Say what to run.

        Args:
            command: what starts the run.
            config: of the run: `[supervise]`, run.dir and checkpoint.grace_s.
            say: writes a line.
        """
        self._command, self._config, self._say = list(command), config, say
        self._folder = Path(config.run.dir).expanduser()
        self._child: subprocess.Popen[bytes] | None = None
        self._stop: str | None = None

    def keep(self) -> Ended:
        """Run until it is done, told to stop, or given up.

        Raises:
            TrainingError: given up, with what the last failures were; or told to stop
                while no process was there to save.
        """
        failures: list[_Failure] = []
        latest = 0
        with self._signals(), tempfile.TemporaryDirectory(prefix="llmos-") as scratch:
            for start in range(1, sys.maxsize):
                ended, failure = self._one(Path(scratch) / f"{start}.json")
                if failure is None or self._stop is not None:
                    return self._last(ended)
                gone_on = failure.resumed_from or 0
                if gone_on > latest:
                    latest, failures = gone_on, []
                failures.append(failure)
                self._give_up_or_wait(failures)
        raise AssertionError("unreachable")

    def _last(self, ended: Ended) -> Ended:
        if ended.code <= _KILLED:
            return ended
        raise TrainingError(
            f"stopped by {self._stop} before the run could save. It goes on from its "
            "last checkpoint when it is started again."
        )

    def _one(self, beats: Path) -> tuple[Ended, _Failure | None]:
        """Run one process to its end."""
        with tempfile.TemporaryFile() as out:
            child = self._child = self._start(beats, out)
            if self._stop is not None:  # it came while there was nobody to tell
                child.terminate()
            self._say(f"supervise: started process {child.pid}")
            try:
                hung = self._watch(child, beats)
            finally:
                self._end(child)
            out.seek(0)
            stdout = out.read().decode(errors="replace")
        code = child.returncode
        ended = Ended(
            code=code if code >= 0 else _KILLED - code, stdout=stdout.rstrip()
        )
        if code in _PASSED_ON and hung is None:
            return ended, None
        return ended, _judged(code, hung, read_heartbeat(beats))

    def _start(self, beats: Path, out: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            stdout=out,
            env={**os.environ, VARIABLE: str(beats)},
            start_new_session=True,  # Ctrl-C comes here, and is handed on once
        )

    def _watch(self, child: subprocess.Popen[bytes], beats: Path) -> str | None:
        """Wait for the end; the story of a hang, if that is what ended it."""
        began = time.monotonic()
        while child.poll() is None:
            time.sleep(_LOOK_S)
            row = read_heartbeat(beats)
            silent_s = time.monotonic() - row.get("at", began)
            if silent_s > self._patience_s(row) and child.poll() is None:
                return self._end_hung(child, row, silent_s, beats)
        return None

    def _patience_s(self, row: dict[str, Any]) -> float:
        """How long a process may be silent."""
        asked = self._config.supervise
        usual = max(asked.hang_s, asked.hang_ratio * (row.get("median_step_s") or 0.0))
        is_stepping = row.get("phase") == "stepping" and row.get("median_step_s")
        return EVERY_S + (usual if is_stepping else _MORE_TIME * usual)

    def _end_hung(
        self,
        child: subprocess.Popen[bytes],
        row: dict[str, Any],
        silent_s: float,
        beats: Path,
    ) -> str:
        where = "before its first step"
        if row.get("step") is not None:
            where = f"after step {row['step']} ({row.get('phase')})"
        story = f"hung {where}: silent for {silent_s:.0f} s"
        if row:  # it has begun to listen to SIGUSR1, which would kill it before
            child.send_signal(signal.SIGUSR1)
            time.sleep(_STACK_S)
            kept = self._keep_stacks(beats)
            story += f", stacks in {kept}" if kept else ", and gave no stacks"
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(self._config.checkpoint.grace_s)
        return story

    def _keep_stacks(self, beats: Path) -> Path | None:
        found = stack_path(beats)
        if not found.is_file() or not found.stat().st_size:
            return None
        number = 1 + len(list(self._folder.glob("hang-*.txt")))
        kept = self._folder / f"hang-{number}.txt"
        with suppress(OSError):
            shutil.copyfile(found, kept)
            return kept
        return None

    def _give_up_or_wait(self, failures: list[_Failure]) -> None:
        asked, last = self._config.supervise, failures[-1]
        if last.would_repeat and len(failures) > 1 and failures[-2].would_repeat:
            raise TrainingError(
                "given up: the run failed by itself, was started again, and "
                f"{last.text.rstrip('.')}. It would fail again."
            )
        if len(failures) > asked.restarts:
            stories = "; it ".join(each.text.rstrip(".") for each in failures[-3:])
            raise TrainingError(
                f"given up: {len(failures)} failures in a row without a new "
                f"checkpoint (supervise.restarts = {asked.restarts}). The run "
                f"{stories}. Start it again when that is mended."
            )
        pause_s = asked.backoff_s * 2 ** min(len(failures) - 1, 30)
        pause_s = min(pause_s, _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
        once = " (once: it may well fail again)" if last.would_repeat else ""
        self._say(
            f"supervise: the run {last.text.rstrip('.')}. Starting it again in "
            f"{pause_s:.1f} s{once}, {len(failures)} of {asked.restarts}"
        )
        self._rest(pause_s)

    def _rest(self, pause_s: float) -> None:
        until = time.monotonic() + pause_s
        while time.monotonic() < until:
            time.sleep(min(_LOOK_S, max(until - time.monotonic(), 0.0)))
            if self._stop is not None:
                raise TrainingError(
                    f"stopped by {self._stop} between two starts of the run, which "
                    "goes on from its last checkpoint when it is started again."
                )

    def _end(self, child: subprocess.Popen[bytes]) -> None:
        """Leave nothing of a process behind."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Meanwhile, SIGTERM and SIGINT are the run's."""

        def hand_on(number: int, frame: object) -> None:
            self._stop = signal.Signals(number).name
            if self._child is not None:
                with suppress(ProcessLookupError):
                    self._child.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _judged(code: int, hung: str | None, row: dict[str, Any]) -> _Failure:
    text = f"ended with exit code {code}"
    if hung is not None:
        text = hung
    elif code < 0:
        text = f"was killed by {signal.Signals(-code).name}"
    elif row.get("phase") == "failed":
        text = f"failed: {row.get('why') or row.get('error')}"
    if code < 0 and hung is None and row.get("step") is not None:
        text += f" after step {row['step']}"
    return _Failure(
        text=text,
        would_repeat=hung is None and row.get("error") in _WOULD_REPEAT,
        resumed_from=row.get("resumed_from"),
    )
