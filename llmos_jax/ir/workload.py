"""Workload: what one step of the job is, before anyone decides how to split it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmos_jax.errors import ConfigError
from llmos_jax.ir.artefact import Artefact

Phase = Literal["train", "prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload(Artefact):
    """One training step, prefill or decode step: B sequences of T tokens.

    `global_batch` counts sequences over all devices; a training step may cut them into
    microbatches, which the plan decides.
    """

    phase: Phase = "train"
    global_batch: int
    seq_len: int
    compute_dtype: str = "bfloat16"
    param_dtype: str = "float32"
    kv_dtype: str = "bfloat16"
    """Of cached keys and values, when serving."""
    optimizer_moments: int = 2
    """Values an optimizer keeps per parameter: AdamW has two moments."""
    local_steps: int = 0
    """Training steps that each replica (mesh axis `data`) takes alone between two
    agreements with the others; 0: they agree on every step's gradients."""
    max_step_s: float | None = None
    """Latency goal: a plan whose step takes longer is turned down."""

    def check(self) -> Workload:
        """Return self, or raise ConfigError for a batch that is none."""
        if self.global_batch < 1 or self.seq_len < 1:
            raise ConfigError(
                f"a step needs at least one sequence of one token; got batch.global = "
                f"{self.global_batch}, batch.seq_len = {self.seq_len}."
            )
        return self

    @property
    def tokens(self) -> int:
        """Tokens one step processes, over all devices."""
        return self.global_batch * (1 if self.phase == "decode" else self.seq_len)
