"""What the engine tells of itself: for metrics, the page and admission."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["starting", "ready", "draining", "failed", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine has room for; fixed when it is built."""

    context: int
    """Tokens of a sequence, prompt and answer, at most."""
    seats: int
    """Sequences that run at once."""
    page_size: int
    """Tokens of a page of the KV cache."""
    pages: int
    max_queue: int
    """Requests that may wait."""
    max_queued_tokens: int
    """Prompt tokens and answers that may wait."""
    vocab_size: int
    labels: tuple[str, ...] = ()
    """Names of the classes, of a classifier; a language model has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """A reading of all gauges and counters; counters only grow."""

    stage: Stage
    problem: str = ""
    """Why it failed."""
    # Gauges
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    pages_held: int = 0
    """By sequences that run."""
    pages_cached: int = 0
    """Held by nobody, and found by prompts that begin alike."""
    tokens_per_s: float = 0.0
    """Of the last seconds: what admission predicts with."""
    bandwidth: float = 0.0
    """Bytes/s that decode steps read of weights and cache, over the last seconds."""
    planned_bandwidth: float = 0.0
    """Bytes/s that the plan's machine reads at most; 0: not known."""
    # Counters
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    """Prompt tokens that were looked up in the prefix cache."""
    prefix_hits: int = 0
    """Of them, tokens that were there."""
    preemptions: int = 0
    steps: int = 0
    step_s: float = 0.0
    """Seconds from a step's dispatch (or the end of the one before) to its end."""
    host_s: float = 0.0
    """Seconds between steps in which the device waited for the host."""
    predicted_s: float = 0.0
    """What the plan predicted for these steps; 0: nothing."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    unplanned_compiles: int = 0
    programs: int = 0
    """Programs that are compiled."""
    texts: int = 0
    """That were classified."""
    batches: dict[int, int] = field(default_factory=dict)
    """Of a classifier, by their rows."""
