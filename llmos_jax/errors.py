"""Every error a user, a file, a device or a request can cause.

LlmosError                     exit 1
├── ConfigError (ValueError)   exit 2  a key, a value, a flag, a file that was named
│   └── DataError              exit 2  the text or labels that a config points at
├── RuleError (ValueError)     exit 2  a rules file, or a model that it cannot split
├── PlanError                  exit 3  a question that cannot be planned
│   └── NoFeasiblePlan         exit 3  every candidate was rejected, with reasons
├── LowerError                 exit 1  the compiler, or the devices, said no
│   └── DoesNotFit             exit 1  it needs more memory than a device has
├── CheckpointError            exit 1  a checkpoint missing, damaged or foreign
│   └── PlanMismatch           exit 1  a checkpoint of another model or other replicas
├── TrainingError              exit 1  the run itself: NaN loss, no disk space
├── CompressError              exit 1  a smaller model that is too far from its source
├── StoreError                 exit 1  an object store that does not answer, or refuses
├── BundleError                exit 1  a Bundle missing, damaged or foreign
└── ServeError                 exit 1  the engine cannot serve, or go on
    ├── Overloaded             exit 1  too much waits already; when to ask again
    └── Stopping               exit 1  the engine takes no more requests

The front doors turn any of them into one `error:` line and its exit code; whatever is
not in this tree is our own bug and keeps its traceback. A message says what was wanted,
what was got, where it came from and the nearest remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LlmosError(Exception):
    """Base of everything that is not a bug of ours."""

    exit_code = 1


class ConfigError(LlmosError, ValueError):
    """A config file, an override or a command line that cannot be used."""

    exit_code = 2


class DataError(ConfigError):
    """Training or evaluation data that is missing, empty or unreadable."""


class RuleError(LlmosError, ValueError):
    """A sharding rules file that is wrong, or does not cover the model."""

    exit_code = 2


class PlanError(LlmosError):
    """The planner was asked for something that cannot be planned."""

    exit_code = 3


class NoFeasiblePlan(PlanError):
    """No candidate survived; `rejected` lists (mesh, reason) for each."""

    def __init__(self, message: str, rejected: tuple[tuple[str, str], ...] = ()):
        super().__init__(message)
        self.rejected = rejected


class LowerError(LlmosError):
    """A plan could not be turned into a program on these devices."""


class DoesNotFit(LowerError):
    """The compiler needs more memory than a device has; both figures in bytes."""

    def __init__(self, machine: str, needed_bytes: float, limit_bytes: float):
        gib = 2.0**30
        super().__init__(
            f"the compiler needs {needed_bytes / gib:.2f} GiB per device on {machine}, "
            f"and {limit_bytes / gib:.2f} GiB are there. Plan for less memory: a "
            "smaller batch.per_device, plan.remat=full, or more devices."
        )
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes


class CheckpointError(LlmosError):
    """A checkpoint could not be read or written."""


class PlanMismatch(CheckpointError):
    """A checkpoint belongs to another model than the one asked for, or to other
    replicas."""


class TrainingError(LlmosError):
    """A training run cannot go on."""


class CompressError(LlmosError):
    """A smaller model is further from its source than was allowed."""


class StoreError(LlmosError):
    """An object store (s3://, gs://) does not answer, refuses, or lacks an object."""


class BundleError(LlmosError):
    """A Bundle could not be read or written."""


class ServeError(LlmosError):
    """The engine cannot serve, or cannot go on."""


class Overloaded(ServeError):
    """More waits than may wait; `retry_after_s` says when there should be room."""

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Stopping(ServeError):
    """The engine takes no more requests."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest choice, or the whole list."""
    known = sorted(set(choices))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(known)}." if known else ""
