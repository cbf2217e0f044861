"""Read and write which layers of a config.json see only a window of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from llmos_jax.interchange.families.table import Family
from llmos_jax.ir import ModelSpec

if TYPE_CHECKING:
    from llmos_jax.interchange.families.read import Known

Pattern = tuple[Literal["sliding", "full"], ...]

_LONG = {True: "sliding_attention", False: "full_attention"}


def read_window(known: Known, family: Family, L: int) -> tuple[int | None, Pattern]:
    """Return `sliding_window` and `layer_pattern`, the shortest that repeats.

    Raises:
        ConfigError: layers of another kind, or not one for each layer, or sliding ones
            without a window.
    """
    window = None
    if family.window != "none" and known.values.get("sliding_window") is not None:
        if not family.window_flag or known.flag("use_sliding_window"):
            window = known.size("sliding_window")
    slides = _slides(known, family, L, window)
    if not any(slides):
        return None, ()
    if window is None:
        raise known.wrong("sliding_window", "how far the sliding layers see")
    return window, pattern_of(slides)


def write_window(spec: ModelSpec, family: Family) -> dict[str, Any]:
    """Return the keys of config.json that say so in this family."""
    slides = spec.is_sliding
    window = spec.sliding_window if any(slides) else None
    if family.window == "none":
        return {}
    keys: dict[str, Any] = {"sliding_window": window}
    if family.window_flag:
        keys["use_sliding_window"] = window is not None
    if family.window in ("late", "alternate"):
        keys["layer_types"] = [_LONG[slide] for slide in slides]
    if family.window == "late":
        first = slides.index(True) if any(slides) else spec.num_layers
        keys["max_window_layers"] = first
    return keys


def pattern_of(slides: tuple[bool, ...]) -> Pattern:
    """Return the shortest pattern that, repeated, gives these layers; () if all of
    them slide."""
    if all(slides):
        return ()
    period = next(
        length
        for length in range(1, len(slides) + 1)
        if all(slides[i] == slides[i % length] for i in range(len(slides)))
    )
    return tuple("sliding" if slide else "full" for slide in slides[:period])


def _slides(
    known: Known, family: Family, L: int, window: int | None
) -> tuple[bool, ...]:
    given = known.values.get("layer_types")
    every = (window is not None,) * L
    if given is None:
        if family.window == "late" and window is not None:
            first = known.values.get("max_window_layers")
            if isinstance(first, bool) or not isinstance(first, int):
                raise known.wrong("max_window_layers", "a number of layers")
            return tuple(layer >= first for layer in range(L))
        if family.window == "alternate":
            usual = family.defaults["sliding_window_pattern"]
            period = known.size("sliding_window_pattern", otherwise=usual)
            return tuple(bool((layer + 1) % period) for layer in range(L))
        return every
    if (
        not isinstance(given, list)
        or len(given) != L
        or any(kind not in _LONG.values() for kind in given)
    ):
        raise known.wrong("layer_types", f"{L} of full_attention and sliding_attention")
    slides = tuple(kind == "sliding_attention" for kind in given)
    if family.window in ("none", "every") and slides != every:
        # transformers ignores the key here; whoever wrote it meant another model.
        raise known.wrong(
            "layer_types", f"what sliding_window = {window} says of every layer"
        )
    return slides
