"""Turn a SentencePiece model into a tokenizer that gives the same ids.

A BPE's merges are not in the file: they are the pairs of pieces whose join is a piece,
best score first. Only common pieces are joined, so the text `</s>` stays text, as it
does with SentencePiece.

Known difference: where a model normalises characters (T5's and ALBERT's do; Llama's,
Gemma's and Mistral's do not), the `tokenizers` library drops a combining accent that
follows a character which is replaced.
"""

from __future__ import annotations

import re

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llmos_jax.data.spm_file import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    SpmModel,
)

_SPACE = "\u2581"


def convert(model: SpmModel, *, prefix_each_part: bool = True) -> tokenizers.Tokenizer:
    """Return the library's tokenizer of a SentencePiece model.

    Args:
        model: what was read.
        prefix_each_part: in text with marks, a space is put in front of every part
            between marks (`legacy` in tokenizer_config.json) and not only the first.
    """
    inner = tokenizers.Tokenizer(
        _bpe(model) if model.algorithm == BPE else _unigram(model)
    )
    inner.normalizer = normalizers.Sequence(_normalizers(model, prefix_each_part))
    steps = _pre_tokenizers(model, prefix_each_part)
    if steps:
        inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = _decoder(model)
    # One by one: the library gives special tokens ids before others otherwise.
    for piece in model.pieces:
        if piece.kind in (UNKNOWN, CONTROL):
            added = tokenizers.AddedToken(piece.text, normalized=False, special=True)
            inner.add_special_tokens([added])
        elif piece.kind == USER_DEFINED and not _cuts_out(model) and _occurs(piece):
            # Looked for in the text with its spaces written as SentencePiece does.
            inner.add_tokens([tokenizers.AddedToken(piece.text, normalized=True)])
    return inner


def _cuts_out(model: SpmModel) -> bool:
    """Whether pieces defined by hand are cut out of the text before the model sees it.

    The library's own way, added tokens, would put the space that stands in front of a
    text in front of each of them; but it is the faster one where there are thousands.
    """
    by_hand = any(piece.kind == USER_DEFINED for piece in model.pieces)
    return by_hand and (model.dummy_prefix or model.algorithm != BPE)


def _occurs(piece: Piece) -> bool:
    return " " not in piece.text  # no text has one once it is normalised


def _bpe(model: SpmModel) -> models.BPE:
    vocab = {piece.text: token for token, piece in enumerate(model.pieces)}
    scores = {
        piece.text: piece.score
        for piece in model.pieces
        if piece.kind in (NORMAL, USER_DEFINED)
    }
    ranked = []
    for whole, score in scores.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in scores and right in scores:
                ranked.append((-score, vocab[left], vocab[right], (left, right)))
    ranked.sort()
    return models.BPE(
        vocab=vocab,
        merges=[pair for *_, pair in ranked],
        unk_token=model.pieces[model.unk_id].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=_cuts_out(model),  # what was cut out is a token as it stands
    )


def _unigram(model: SpmModel) -> models.Unigram:
    return models.Unigram(
        vocab=[(piece.text, piece.score) for piece in model.pieces],
        unk_id=model.unk_id,
        byte_fallback=model.byte_fallback,
    )


def _normalizers(model: SpmModel, each: bool) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.one_space:
        ends, runs = (tokenizers.Regex(one) for one in (r"\A +| +\z", " {2,}"))
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(runs, " ")]
    if model.dummy_prefix and each:
        steps.append(normalizers.Prepend(_SPACE))
    return [*steps, normalizers.Replace(" ", _SPACE)]


def _pre_tokenizers(model: SpmModel, each: bool) -> list[pre_tokenizers.PreTokenizer]:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if model.dummy_prefix and not each:
        steps.append(pre_tokenizers.Metaspace(_SPACE, "first", split=False))
    if _cuts_out(model):
        by_hand = [
            piece.text
            for piece in model.pieces
            if piece.kind == USER_DEFINED and _occurs(piece)
        ]
        longest_first = sorted(by_hand, key=len, reverse=True)
        steps.append(_split_at("|".join(map(re.escape, longest_first))))
    if model.algorithm != BPE or _cuts_out(model):
        # The library would find marks in text; cut in two they are not found.
        names = [
            piece.text
            for piece in model.pieces
            if piece.kind in (UNKNOWN, CONTROL, BYTE) and len(piece.text) > 1
        ]
        inside = (
            f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names
        )
        steps.append(_split_at("|".join(inside)))
    return steps


def _split_at(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def _decoder(model: SpmModel) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
