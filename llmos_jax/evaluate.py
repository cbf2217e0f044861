"""python -m llmos_jax.evaluate MODEL: score a model on text, or put it to tasks.

The text is data.test, else data.validation (--set data.test=FILE), else the part that
the model's own run held out. With --tasks, EleutherAI's lm-eval asks instead. Of a
classifier the texts are labelled; with --predict they need not be.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from llmos_jax import driver
from llmos_jax.cli import Answer, add_model, arguments_of, render, run_verb
from llmos_jax.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Score, and print perplexity and bits per byte, or the metrics of tasks."""
    parser = arguments_of("evaluate", __doc__ or "")
    add_model(parser)
    parser.add_argument(
        "--tasks", metavar="NAME[,NAME]", help="tasks of lm-eval, instead of a text"
    )
    parser.add_argument(
        "--tasks-from", metavar="DIR", help="a folder with more tasks, as YAML files"
    )
    parser.add_argument(
        "--predict",
        metavar="FILE",
        help="of a classifier: write what it says of every text, as JSON lines",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="ask only N documents of each task"
    )

    def answer(arguments: Any) -> Answer:
        if arguments.tasks is not None:
            return _tasks(arguments)
        for flag in ("tasks_from", "limit"):
            if getattr(arguments, flag) is not None:
                name = flag.replace("_", "-")
                raise ConfigError(f"--{name} says how --tasks run. Name some tasks.")
        report = driver.evaluate(
            arguments.model, arguments.overrides, predict=arguments.predict
        )
        return Answer(text=render.scores(report), json=report)

    return run_verb(parser, argv, answer)


def _tasks(arguments: Any) -> Answer:
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks names no task. Give some, with commas between.")
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit is {arguments.limit}; it must be at least 1.")
    try:
        from llmos_jax import harness
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ConfigError(
            "--tasks needs EleutherAI's lm-eval, which is not installed here. "
            "Run `pip install -e .[eval]`."
        ) from None
    report = harness.run_tasks(
        arguments.model,
        names,
        arguments.overrides,
        folder=arguments.tasks_from,
        limit=arguments.limit,
    )
    return Answer(text=_table(report), json=report)


def _table(report: dict[str, Any]) -> str:
    """One line per task and metric, its standard error beside it."""
    rows = [("task", "metric", "value", "stderr")]
    for task, metrics in report["tasks"].items():
        for key, value in metrics.items():
            name, comma, by = key.partition(",")
            if name.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{name}_stderr{comma}{by}")
            rows.append((task, key, f"{value:.4g}", _error(stderr)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = (
        f"{task:<{widths[0]}}  {metric:<{widths[1]}}  {value:>{widths[2]}}  {error}"
        for task, metric, value, error in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f"+- {stderr:.2g}"


if __name__ == "__main__":
    sys.exit(main())
