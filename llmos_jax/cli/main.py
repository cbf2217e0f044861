"""The console script `llmos VERB ...`: the same doors as `python -m llmos_jax.VERB`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from llmos_jax.errors import did_you_mean

VERBS = {
    "plan": "choose how to split a model's work over a machine, and explain it",
    "train": "train a model from a config",
    "evaluate": "score a model on text",
    "generate": "continue a prompt",
    "convert": "turn a model into another form: ours, Hugging Face's, GGUF",
    "compress": "make a model smaller: weights in 8 or 4 bits, and what that costs",
    "export": "put a model, its programs and its origin into one folder to serve",
    "serve": "answer over HTTP as OpenAI's API does",
    "doctor": "say what is here, what works and what is missing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a verb's page; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {verb:<10}{what}" for verb, what in VERBS.items()]
        print("usage: llmos VERB ...\n\n" + "\n".join(lines))
        return 0 if words else 2
    if words[0] not in VERBS:
        hint = did_you_mean(words[0], VERBS)
        print(f"error: unknown verb {words[0]!r}.{hint}", file=sys.stderr)
        return 2
    page = importlib.import_module(f"llmos_jax.{words[0]}")
    return int(page.main(words[1:]))
