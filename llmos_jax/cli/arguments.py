"""The arguments every verb understands in the same way."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from llmos_jax.errors import ConfigError


class Arguments(argparse.ArgumentParser):
    """A parser whose mistakes are one `error:` line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage."""
        raise ConfigError(f"{message}. See `python -m {self.prog} --help`.")


def arguments_of(verb: str, description: str) -> Arguments:
    """Return a parser with the flags that all verbs share."""
    parser = Arguments(
        prog=f"llmos_jax.{verb}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override any config key, dotted; may be repeated",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print exactly one JSON object on stdout; everything else goes to stderr",
    )
    return parser


def add_config(parser: Arguments, default: str | None = None) -> None:
    """Add the optional CONFIG position."""
    parser.add_argument(
        "config",
        nargs="?",
        default=default,
        metavar="CONFIG",
        help="a TOML file, or a name under configs/"
        + (f" (default: {default})" if default else ""),
    )


def add_model(parser: Arguments) -> None:
    """Add the MODEL position."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run folder, a checkpoint, a Bundle, a Hugging Face folder, a GGUF file",
    )


def parse(parser: Arguments, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; `--help` leaves with exit code 0 as usual."""
    return parser.parse_args(argv)
