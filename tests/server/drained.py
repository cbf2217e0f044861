"""Run as a script: `run` over a fake engine, told by its arguments."""

from __future__ import annotations

import json
import sys
import time

from fake_engine import FakeEngine, say
from serving_here import NAME, tokenizer

from llmos_jax.cli import Answer, arguments_of, run_verb
from llmos_jax.server import ServerOptions, run


def main(port: int, drain_s: float, step_s: float, hangs_s: float) -> int:
    """Serve `0123456789`, one letter each step_s; `stop` takes hangs_s."""
    engine = FakeEngine(say("0123456789"), step_s=step_s)

    if hangs_s:
        engine.stop = lambda: time.sleep(hangs_s)

    def answer(_) -> Answer:
        options = ServerOptions(port=port, drain_s=drain_s)
        return Answer(text="", json=run(engine, tokenizer(), NAME, options))

    return run_verb(arguments_of("fake", ""), ["--json"], answer)


if __name__ == "__main__":
    sys.exit(main(*map(json.loads, sys.argv[1:])))
