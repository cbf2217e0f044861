"""python -m llmos_jax.serve MODEL: an OpenAI-compatible HTTP server.

It prints its address on stderr, and one line of JSON for each request. SIGTERM (or
Ctrl-C) makes it drain: it takes no more, and what it accepted has --drain-s to end.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmos_jax import driver
from llmos_jax.cli import Answer, add_model, arguments_of, run_verb
from llmos_jax.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop."""
    parser = arguments_of("serve", __doc__ or "")
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS")
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0 takes any that is free"
    )
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="who may ask; may be repeated (or LLMOS_API_KEY, hidden from `ps`)",
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=None,
        metavar="N",
        help="requests that may wait; more are told to come again (429)",
    )
    parser.add_argument(
        "--drain-s",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that accepted requests have to end when it is told to stop",
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM")
    parser.add_argument(
        "--served-name", metavar="NAME", help="what clients call the model"
    )

    def answer(arguments: Any) -> Answer:
        from llmos_jax.server import ServerOptions

        if arguments.max_queue is not None and arguments.max_queue < 0:
            raise ConfigError(
                f"--max-queue is {arguments.max_queue}; it must be at least 0."
            )
        report = driver.serve(
            arguments.model,
            arguments.overrides,
            ServerOptions(
                host=arguments.host,
                port=arguments.port,
                api_keys=(*arguments.api_key, *_key_of_environment()),
                drain_s=arguments.drain_s,
                tls_cert=arguments.tls_cert,
                tls_key=arguments.tls_key,
                served_name=arguments.served_name,
            ).check(),
            max_queue=arguments.max_queue,
        )
        return Answer(text="", json=report)

    return run_verb(parser, argv, answer)


def _key_of_environment() -> list[str]:
    key = os.environ.get("LLMOS_API_KEY")
    return [] if key is None else [key]


if __name__ == "__main__":
    sys.exit(main())
