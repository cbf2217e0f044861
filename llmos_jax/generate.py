"""python -m llmos_jax.generate MODEL --prompt TEXT: continue a prompt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from llmos_jax import driver
from llmos_jax.cli import (
    Answer,
    add_model,
    arguments_of,
    run_verb,
    speak,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Generate; the text streams to stdout, or comes whole with --json."""
    parser = arguments_of("generate", __doc__ or "")
    add_model(parser)
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="1 keeps all"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="of the likeliest's share"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    parser.add_argument("--presence-penalty", type=float, default=0.0, metavar="A")
    parser.add_argument("--frequency-penalty", type=float, default=0.0, metavar="A")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the chat template"
    )

    def answer(arguments: Any) -> Answer:
        from llmos_jax.serving import Sampling

        # Said with the first token, so that an error stands on a line of its own.
        waiting = [] if arguments.chat else [arguments.prompt]

        def hear(text: str) -> None:
            while waiting:
                speak(waiting.pop())
            speak(text)

        report = driver.generate(
            arguments.model,
            arguments.prompt,
            arguments.overrides,
            max_tokens=arguments.max_tokens,
            sampling=Sampling(
                temperature=arguments.temperature,
                top_k=arguments.top_k,
                top_p=arguments.top_p,
                min_p=arguments.min_p,
                repetition_penalty=arguments.repetition_penalty,
                presence_penalty=arguments.presence_penalty,
                frequency_penalty=arguments.frequency_penalty,
                seed=arguments.seed,
            ),
            is_chat=arguments.chat,
            on_text=None if arguments.json else hear,
        )
        return Answer(text="", json=report)

    return run_verb(parser, argv, answer, speaks=True)


if __name__ == "__main__":
    sys.exit(main())
