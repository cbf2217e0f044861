"""MinHash: 128 numbers that estimate how many runs of words two texts share.

The estimate is the share of equal numbers (Broder, SEQUENCES 1997), off by 0.035 at 0.8
(one standard deviation). Candidates are found by 21 bands of 6 numbers (Indyk and
Motwani, STOC 1998): texts that share 0.8 of their runs meet in a band with probability
1 - (1 - 0.8^6)^21 = 0.998, those that share 0.4 with 0.08; what meets is compared by
all 128. Runs are of five words, as in the peers (datatrove, arXiv 2406.17557).
"""

from __future__ import annotations

import numpy as np
import rensa

from llmos_jax.corpus.words import Words

RUN_WORDS = 5
NUMBERS = 128
BANDS = 21
BAND_ROWS = 6
_SEED = 8
_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: spreads the bits


def signature(words: Words) -> np.ndarray:
    """Return uint32 [128]; a text shorter than a run is one run."""
    runs = np.unique(words.runs(min(RUN_WORDS, words.hashes.size)))
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        runs, np.array([0, runs.size]), NUMBERS, _SEED
    )
    return np.array(matrix.to_rows()[0], np.uint32)


def bands(signatures: np.ndarray) -> np.ndarray:
    """Return the key of each band, uint64 [21, texts], of uint32 [texts, 128]."""
    numbers = signatures[:, : BANDS * BAND_ROWS].astype(np.uint64)
    numbers = numbers.reshape(-1, BANDS, BAND_ROWS)
    keys = np.zeros(numbers.shape[:2], np.uint64)
    for row in range(BAND_ROWS):
        keys = (keys ^ numbers[:, :, row]) * np.uint64(_MULTIPLIER)
        keys ^= keys >> np.uint64(29)
    return np.ascontiguousarray(keys.T)


def similarity(signatures: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Estimate the Jaccard similarity of texts, [texts, 128], to one, [128]."""
    return (signatures == to).mean(axis=1)
