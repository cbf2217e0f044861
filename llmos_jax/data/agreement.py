"""Settle what a run's sources must agree on: one tokenizer, and a weight for each.

A corpus was cut by a tokenizer long ago. The model's is the same one if its fingerprint
is, or if it gives every id the same name and begins and ends texts by the same marks: a
chat template more or less, or another file format, changes no token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from llmos_jax.config.schema import DataSection
from llmos_jax.data.corpora import OpenCorpus
from llmos_jax.data.tokenizer import Tokenizer, check_vocabulary
from llmos_jax.data.tokens import given_tokenizer, with_template
from llmos_jax.errors import ConfigError


def agreed_tokenizer(
    section: DataSection,
    corpora: Iterable[OpenCorpus],
    own: Tokenizer | None,
    vocab_size: int,
    model_name: str,
) -> Tokenizer | None:
    """Return the tokenizer that all sources are cut by; None: it is to be trained.

    Raises:
        ConfigError: it cannot be read, or does not fit the model or a corpus.
    """
    choice = section.tokenizer
    given = given_tokenizer(choice, own)
    for corpus in corpora:
        if choice == "train":
            raise ConfigError(
                f"data.tokenizer = `train`, but the corpus {corpus.name} is cut into "
                "tokens already. Leave data.tokenizer out."
            )
        given = given or corpus.tokenizer
        whose = "the model's tokenizer" if own else "the one of the other corpus"
        check_same(given, corpus, whose if choice == "auto" else choice)
        if given.vocab_size > vocab_size:
            raise ConfigError(
                f"the corpus {corpus.name} is of {given.vocab_size} tokens, but the "
                f"vocabulary of model {model_name} has room for {vocab_size}. Prepare "
                "it again with the model's own tokenizer, or take a larger model."
            )
    if given is None:
        return None
    check_vocabulary(given, vocab_size, model_name)
    return with_template(given, section)


def check_same(tokenizer: Tokenizer, corpus: OpenCorpus, whose: str) -> None:
    """Raise ConfigError unless the tokenizer gives the corpus's ids their names."""
    theirs = corpus.tokenizer
    if tokenizer.fingerprint == theirs.fingerprint:
        return
    marks = [(one.begin_id, one.eos_id) for one in (tokenizer, theirs)]
    if marks[0] == marks[1] and tokenizer.vocabulary() == theirs.vocabulary():
        return
    raise ConfigError(
        f"the corpus {corpus.name} was cut by another tokenizer "
        f"({theirs.vocab_size} tokens, fingerprint {theirs.fingerprint}) than {whose} "
        f"({tokenizer.vocab_size} tokens, {tokenizer.fingerprint}). Prepare the text "
        "again with data.tokenizer set to the one that the model has, into another "
        "prepare.out."
    )


def check_weights(section: DataSection) -> None:
    """Raise ConfigError unless every entry of `data.train` has a weight, or none."""
    weights, train = section.weights, section.train
    if not weights:
        return
    if len(weights) != len(train):
        raise ConfigError(
            f"data.weights has {len(weights)} numbers, but data.train names "
            f"{len(train)} sources ({', '.join(train)}). Give one for each."
        )
    for weight, entry in zip(weights, train):
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(
                f"data.weights gives {entry} the weight {weight:g}; it must be more "
                "than 0. Leave out of data.train what is not to be read."
            )
