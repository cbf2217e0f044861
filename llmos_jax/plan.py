"""python -m llmos_jax.plan [CONFIG]: choose how to split the work, and explain it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmos_jax import driver, planner
from llmos_jax.cli import Answer, add_config, arguments_of, run_verb
from llmos_jax.config import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Plan and print; exit 3 when nothing fits."""
    parser = arguments_of("plan", __doc__ or "")
    add_config(parser)
    parser.add_argument("--out", metavar="FILE", help="also write plan.json here")
    parser.add_argument(
        "--rules", metavar="NAME", help="a name under sharding_rules/, or a path"
    )
    parser.add_argument(
        "--mesh", metavar="data=4,tensor=2", help="short for --set plan.mesh.AXIS=N"
    )
    parser.add_argument(
        "--params", action="store_true", help="also list how every parameter is split"
    )

    def answer(arguments: Any) -> Answer:
        overrides = list(arguments.overrides)
        pins = [pin.strip() for pin in (arguments.mesh or "").split(",")]
        overrides += [f"plan.mesh.{pin}" for pin in pins if pin]
        overrides += [f"rules={arguments.rules}"] if arguments.rules else []
        loaded = load_config(arguments.config, overrides)
        chosen = driver.plan(loaded.config)
        if arguments.out:
            path = Path(arguments.out)
            path.write_text(json.dumps(driver.plan_document(chosen), indent=1) + "\n")
        text = chosen.explain()
        if arguments.params:
            text += "\n\n" + planner.explain_params(chosen)
        return Answer(text=text, json=chosen.summary())

    return run_verb(parser, argv, answer)


if __name__ == "__main__":
    sys.exit(main())
