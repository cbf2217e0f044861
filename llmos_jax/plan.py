"""python -m llmos_jax.plan [CONFIG]: choose how to split the work, and explain it.

plan [CONFIG]                          one plan, explained
plan [CONFIG] --topology any           the slices worth renting, by time and cost
plan [CONFIG] --what-if KEY=VALUE      what a change would do
plan --diff A B                        what differs between two plans
plan [CONFIG] --lock FILE              keep the plan with its versions ...
plan --check FILE                      ... and see later whether it still stands
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmos_jax import driver, hardware, planner, questions, resolve
from llmos_jax.cli import Answer, add_config, arguments_of, run_verb
from llmos_jax.cli.arguments import Arguments
from llmos_jax.config import RunConfig, load_config
from llmos_jax.errors import ConfigError, did_you_mean
from llmos_jax.ir import Plan
from llmos_jax.telemetry import log

_FIDELITIES = ("estimate", "probe", "compile")
_ANY = "any"
_MAX_CHIPS = 256
_PROGRESS_EVERY_S = 2.0

_MODES = {
    "one plan": ("topology", "out", "params", "html", "lock", "verify"),
    "--topology any": (
        "topology", "chips", "max_chips", "max_slices", "prices", "html",
    ),
    "--what-if": ("topology", "what_if", "verify"),
    "--diff": ("diff",),
    "--check": ("check", "verify"),
}  # fmt: skip
"""What each way to use this verb understands, beside CONFIG, --set, --rules, --mesh."""
_ASKED = ("config", "overrides", "rules", "mesh")


def main(argv: Sequence[str] | None = None) -> int:
    """Plan and print; exit 3 when nothing fits."""
    return run_verb(_parser(), argv, _answer)


def _parser() -> Arguments:
    parser = arguments_of("plan", __doc__ or "")
    add_config(parser)
    add = parser.add_argument
    add("--out", metavar="FILE", help="also write plan.json here")
    add("--html", metavar="FILE", help="also write one self-contained page here")
    add("--rules", metavar="NAME", help="a name under sharding_rules/, or a path")
    add("--mesh", metavar="data=4,tensor=2", help="short for --set plan.mesh.AXIS=N")
    add("--params", action="store_true", help="also list how every parameter is split")
    add(
        "--verify",
        metavar="HOW",
        help="estimate (closed form, default), probe (compile one and two layers) or "
        "compile (the exact program); no chip is needed",
    )
    add(
        "--topology",
        metavar="NAME",
        help="short for --set topology=NAME; `any`: compare the slices of --chips",
    )
    add("--chips", metavar="v5e,v6e", help="kinds of chips to compare; default: TPUs")
    add("--max-chips", metavar="N", help=f"of one machine; default: {_MAX_CHIPS}")
    add("--max-slices", metavar="N", help="of one machine, joined by DCN; default: 1")
    add("--prices", metavar="FILE", help="price list; default: configs/prices.toml")
    add(
        "--what-if",
        metavar="KEY=VALUE",
        action="append",
        help="plan as asked and with this change, and show what differs; repeatable",
    )
    add(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        help="compare two plan.json, locks, run folders or configs",
    )
    add("--lock", metavar="FILE", help="also write a lock: versions, inputs, figures")
    add("--check", metavar="LOCK", help="plan a lock again and say what moved")
    return parser


def _answer(arguments: Any) -> Answer:
    mode = _mode_of(arguments)
    answers: dict[str, Callable[[Any], Answer]] = {
        "one plan": _one_plan,
        "--topology any": _front,
        "--what-if": _what_if,
        "--diff": _diff,
        "--check": _check,
    }
    return answers[mode](arguments)


def _one_plan(arguments: Any) -> Answer:
    config = _config(arguments)
    chosen = driver.plan(config, _fidelity(arguments) or "estimate")
    if arguments.out:
        document = json.dumps(driver.plan_document(chosen), indent=1)
        _write("--out", arguments.out, document + "\n")
    if arguments.lock:
        locked = questions.lock(config, chosen).to_json()
        _write("--lock", arguments.lock, json.dumps(locked, indent=1) + "\n")
    if arguments.html:
        _write("--html", arguments.html, questions.plan_page(config, chosen))
    if arguments.json:
        return Answer(text="", json=chosen.summary(), failure=_unmeant(chosen))
    text = planner.explain(chosen, resolve.pins_of(config))
    if arguments.params:
        text += "\n\n" + planner.explain_params(chosen)
    return Answer(text=text, json={}, failure=_unmeant(chosen))


def _unmeant(chosen: Plan) -> str:
    """What is wrong with the compiled program: data moved that the plan does not
    mean."""
    wrong = (chosen.compiled or {}).get("unplanned_collectives", [])
    if not wrong:
        return ""
    first = wrong[0]
    return (
        f"{len(wrong)} collectives of the compiled program are not what the plan "
        f"means; the largest: {first['op']} over {' and '.join(first['axes'])}: "
        f"{first['why']}"
    )


def _front(arguments: Any) -> Answer:
    front = questions.frontier(
        _config(arguments),
        _chips(arguments.chips),
        max_chips=_whole("--max-chips", arguments.max_chips, _MAX_CHIPS),
        max_slices=_whole("--max-slices", arguments.max_slices, 1),
        prices=arguments.prices,
        on_progress=_now_and_then(log),
    )
    if arguments.html:
        _write("--html", arguments.html, questions.front_page(front))
    return Answer(text=planner.explain_front(front), json=front.summary())


def _what_if(arguments: Any) -> Answer:
    found = questions.what_if(
        _config(arguments), arguments.what_if, _fidelity(arguments) or "estimate"
    )
    return Answer(text=planner.explain_difference(found), json=found.summary())


def _diff(arguments: Any) -> Answer:
    found = questions.diff(*arguments.diff)
    return Answer(text=planner.explain_difference(found), json=found.summary())


def _check(arguments: Any) -> Answer:
    found = questions.check(arguments.check, _fidelity(arguments))
    return Answer(
        text=planner.explain_recheck(found),
        json=found.summary(),
        failure="" if found.stands else f"{found.lock}: {'; '.join(found.problems)}.",
    )


def _mode_of(arguments: Any) -> str:
    """What is asked for; an option of another mode is refused, not ignored."""
    modes = [
        mode
        for mode, asked in {
            "--topology any": arguments.topology == _ANY,
            "--what-if": arguments.what_if,
            "--diff": arguments.diff,
            "--check": arguments.check,
        }.items()
        if asked
    ]
    if len(modes) > 1:
        raise ConfigError(
            f"{' and '.join(modes)} are two questions; ask one at a time."
        )
    mode = modes[0] if modes else "one plan"
    options = {option for known in _MODES.values() for option in known}
    for option in sorted(options - set(_MODES[mode])):
        if getattr(arguments, option):
            homes = [name for name, known in _MODES.items() if option in known]
            raise ConfigError(
                f"--{option.replace('_', '-')} does not go with {mode}; "
                f"it belongs to {' and '.join(homes)}."
            )
    if mode in ("--diff", "--check"):
        for option in _ASKED:
            if getattr(arguments, option):
                given = {"config": "CONFIG", "overrides": "--set"}
                raise ConfigError(
                    f"{given.get(option, f'--{option}')} does not go with {mode}: "
                    "what it compares says all that was asked."
                )
    return mode


def _config(arguments: Any) -> RunConfig:
    overrides = list(arguments.overrides)
    pins = [pin.strip() for pin in (arguments.mesh or "").split(",")]
    overrides += [f"plan.mesh.{pin}" for pin in pins if pin]
    overrides += [f"rules={arguments.rules}"] if arguments.rules else []
    if arguments.topology and arguments.topology != _ANY:
        overrides.append(f"topology={arguments.topology}")
    return load_config(arguments.config, overrides).config


def _fidelity(arguments: Any) -> str | None:
    asked: str | None = arguments.verify
    if asked is not None and asked not in _FIDELITIES:
        raise ConfigError(
            f"--verify {asked!r} is not known.{did_you_mean(asked, _FIDELITIES)}"
        )
    return asked


def _chips(text: str | None) -> list[str]:
    if text is None:
        return [name for name, chip in hardware.CHIPS.items() if chip.vendor == "tpu"]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError("--chips names no chip; for example --chips v5e,v6e.")
    return list(dict.fromkeys(hardware.chip(name).name for name in names))


def _whole(option: str, text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{option} {text!r}: give a whole number from 1.")
    return int(text)


def _now_and_then(say: Callable[[str], None]) -> Callable[[str], None]:
    """Pass on the first message, and then at most one every two seconds."""
    last_s: list[float] = []

    def maybe(text: str) -> None:
        now = time.monotonic()
        if not last_s or now - last_s[-1] >= _PROGRESS_EVERY_S:
            last_s.append(now)
            say(text)

    return maybe


def _write(option: str, name: str, text: str) -> None:
    try:
        Path(name).expanduser().write_text(text, encoding="utf-8")
    except OSError as problem:
        raise ConfigError(
            f"{option} {name} cannot be written: {problem.strerror}."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
