"""Texts with a label in, batches of few lengths out: the data of classifiers.

Read in the order of the flow: `read` (with `lines` and `python_packages`) gives rows,
`prepare` tells sides apart and has `sides` cut them into tokens, `batches` deals them.
"""

from llmos_jax.data.labelled.batches import (
    LabelledBatches,
    bucket_lengths,
    evaluation_rows,
    padding_share,
)
from llmos_jax.data.labelled.prepare import (
    LabelledData,
    labels_of,
    prepare_labelled,
    read_to_predict,
)
from llmos_jax.data.labelled.python_packages import PACKAGES, PYTHON_PACKAGES
from llmos_jax.data.labelled.sides import LabelledSide

__all__ = [
    "PACKAGES",
    "PYTHON_PACKAGES",
    "LabelledBatches",
    "LabelledData",
    "LabelledSide",
    "bucket_lengths",
    "evaluation_rows",
    "labels_of",
    "padding_share",
    "prepare_labelled",
    "read_to_predict",
]
