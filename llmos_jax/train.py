"""python -m llmos_jax.train [CONFIG]: train a model from a config.

Makes run.dir with checkpoints, metrics, report.html and report.json. Running again on
the same folder resumes; a finished run says so and changes nothing. With --supervise it
resumes by itself after a crash or a hang.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from llmos_jax.cli import Answer, add_config, arguments_of, render, run_verb
from llmos_jax.config import Loaded, load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print where everything lies."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = arguments_of("train", __doc__ or "")
    add_config(parser, default="quickstart")
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="run it in a process of its own, and start that again after a crash or "
        "a hang ([supervise])",
    )
    code = 0

    def answer(arguments: Any) -> Answer:
        nonlocal code
        loaded = load_config(arguments.config, arguments.overrides)
        if arguments.supervise:
            code, result = _supervised(words, loaded)
            return result
        report = _train(loaded, is_process=argv is None)
        return Answer(text=render.train_summary(report), json=report)

    return run_verb(parser, words, answer) or code


def _train(loaded: Loaded, *, is_process: bool) -> dict[str, Any]:
    """Train in this process; where it is watched, say what went wrong."""
    from llmos_jax import driver
    from llmos_jax.telemetry import open_heartbeat, process_began

    heartbeat = open_heartbeat()
    began = process_began() if is_process else None
    try:
        return driver.train(loaded.config, began=began, heartbeat=heartbeat)
    except Exception as problem:
        if heartbeat is not None:
            heartbeat.failed(problem)
        raise


def _supervised(words: list[str], loaded: Loaded) -> tuple[int, Answer]:
    """Train in another process; its exit code and what it printed."""
    from llmos_jax.supervise import Supervisor
    from llmos_jax.telemetry import log

    own = [word for word in words if word != "--supervise"]
    command = [sys.executable, "-m", "llmos_jax.train", *own]
    ended = Supervisor(command, loaded.config, log).keep()
    report = json.loads(ended.stdout) if "--json" in own and ended.stdout else {}
    return ended.code, Answer(text=ended.stdout, json=report)


if __name__ == "__main__":
    sys.exit(main())
