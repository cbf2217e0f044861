"""Read the tokenizer that came with a model: a Hugging Face folder, or one file.

What a folder says in several places is taken in this order: tokenizer_config.json,
special_tokens_map.json, generation_config.json, config.json. A template in
chat_template.jinja comes before one inside tokenizer_config.json, and of several the
one named `default` counts, as with `transformers`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from llmos_jax.data.marks import Marks, frame_of, marks_of, set_frame
from llmos_jax.data.spm import convert
from llmos_jax.data.spm_file import SpmModel, read_spm
from llmos_jax.data.tokenizer import Tokenizer, read_json
from llmos_jax.errors import ConfigError

_SPM_FILES = ("tokenizer.model", "spiece.model")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, a SentencePiece *.model, or the folder of a model.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        return tokenizer_of_folder(file)
    if file.suffix == ".model":
        return _of_spm(file, {})
    text = _text(file)
    try:
        return Tokenizer.from_json(text)
    except ConfigError as problem:
        raise ConfigError(f"tokenizer {file}: {problem}") from None


def tokenizer_of_folder(path: str | Path) -> Tokenizer:
    """Read the tokenizer of a Hugging Face folder, with its marks and chat template.

    Raises:
        ConfigError: no tokenizer.json and no tokenizer.model, or one of the files
            cannot be read.
    """
    folder = Path(path).expanduser()
    about = _about(folder)
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            inner, marks = read_json(_text(file))
            return Tokenizer(inner, marks or _marks(inner, about, None))
        except ConfigError as problem:
            raise ConfigError(f"tokenizer {file}: {problem}") from None
    for name in _SPM_FILES:
        if (folder / name).is_file():
            return _of_spm(folder / name, about)
    raise ConfigError(
        f"folder {folder} has no tokenizer: wanted tokenizer.json or tokenizer.model. "
        "Copy it from where the model came from, or set data.tokenizer to its path."
    )


def _of_spm(file: Path, about: dict[str, Any]) -> Tokenizer:
    model = read_spm(file)
    config = about.get("tokenizer_config.json", {})
    inner = convert(model, prefix_each_part=config.get("legacy") is not False)
    _add_tokens(inner, config, file)
    # transformers would build the vocabulary of another class anew, by its own rules.
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    try:
        marks = _marks(inner, {**about, "tokenizer_config.json": config}, model)
    except ConfigError as problem:
        raise ConfigError(f"tokenizer {file}: {problem}") from None
    if config.get("add_eos_token"):
        set_frame(inner, [], [marks.eos_id])
    return Tokenizer(inner, marks)


def _add_tokens(
    inner: tokenizers.Tokenizer, config: dict[str, Any], file: Path
) -> None:
    """Add the tokens that tokenizer_config.json lists beside the model's own."""
    listed = config.get("added_tokens_decoder", {})
    for token, facts in sorted(listed.items(), key=lambda item: int(item[0])):
        name, is_mark = facts["content"], facts.get("special", False)
        added = tokenizers.AddedToken(name, normalized=False, special=is_mark)
        (inner.add_special_tokens if is_mark else inner.add_tokens)([added])
        if inner.token_to_id(name) != int(token):
            raise ConfigError(
                f"tokenizer {file}: tokenizer_config.json wants {name!r} to be token "
                f"{token}, but the next free one is {inner.token_to_id(name)}."
            )


def _marks(
    inner: tokenizers.Tokenizer, about: dict[str, Any], model: SpmModel | None
) -> Marks:
    config = dict(about.get("tokenizer_config.json", {}))
    config.pop("chat_template", None)
    before, _ = frame_of(inner)
    bos_id = before[-1] if before else _mark(inner, about, "bos")
    eos_id = _mark(inner, about, "eos")
    if model is not None:
        bos_id = model.bos_id if bos_id is None else bos_id
        eos_id = model.eos_id if eos_id is None else eos_id
    if eos_id is None:
        eos_id = marks_of(inner).eos_id
    # Where there is a tokenizer.json its post-processor alone says what is added, and
    # add_bos_token beside it says nothing; so does release 5 of transformers.
    adds_bos = bool(before) if model is None else config.get("add_bos_token", True)
    return Marks(
        bos_id=bos_id,
        eos_id=eos_id,
        stop_ids=frozenset({eos_id, *_ids(about.get("generation_config.json"), "eos")}),
        adds_bos=bool(adds_bos) and bos_id is not None,
        chat_template=_template(about),
        config=config,
    )


def _mark(inner: tokenizers.Tokenizer, about: dict[str, Any], role: str) -> int | None:
    """Return the id of `bos` or `eos` as the files name it."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        value = about.get(file, {}).get(f"{role}_token")
        name = value.get("content") if isinstance(value, dict) else value
        if name is None:
            continue
        token = inner.token_to_id(name)
        if token is None:
            raise ConfigError(
                f"{file} beside it says {role}_token = {name!r}, and the vocabulary "
                "has no such token."
            )
        return token
    for file in ("generation_config.json", "config.json"):
        ids = _ids(about.get(file), role)
        if ids:
            return ids[0]
    return None


def _ids(config: dict[str, Any] | None, role: str) -> list[int]:
    found = (config or {}).get(f"{role}_token_id")
    return [] if found is None else found if isinstance(found, list) else [found]


def _template(about: dict[str, Any]) -> str | None:
    if "chat_template.jinja" in about:
        template: str = about["chat_template.jinja"]
        return template
    for file in ("tokenizer_config.json", "chat_template.json"):
        found = about.get(file, {}).get("chat_template")
        if isinstance(found, list):
            found = {one["name"]: one["template"] for one in found}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str):
            return found
    return None


def _about(folder: Path) -> dict[str, Any]:
    """Return the files beside the tokenizer that are there, read."""
    about: dict[str, Any] = {}
    for name in (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "config.json",
        "chat_template.json",
    ):
        if not (folder / name).is_file():
            continue
        try:
            about[name] = json.loads(_text(folder / name))
        except ValueError as problem:
            raise ConfigError(f"{folder / name}: not JSON: {problem}.") from None
        if not isinstance(about[name], dict):
            raise ConfigError(f"{folder / name}: wanted a JSON object.")
    if (folder / "chat_template.jinja").is_file():
        about["chat_template.jinja"] = _text(folder / "chat_template.jinja")
    return about


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or "it is not text"
        raise ConfigError(
            f"tokenizer {file} cannot be read: {reason}. Set data.tokenizer to `auto`, "
            "`train`, `bytes`, or the path of a tokenizer.json, a SentencePiece "
            "*.model or a model's folder."
        ) from None
