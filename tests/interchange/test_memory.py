"""A model is never twice in memory while it is read or written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import small

from llmos_jax.interchange import architecture_of, spec_of, weight_map
from llmos_jax.interchange.check import tensors_of
from llmos_jax.interchange.safetensors_file import header_bytes

ALLOWED = 1.3
"""Peak of resident memory over that of the interpreter, as a part of the weights."""

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""570 MB in float32, half of it in one tensor."""

MEASURE = """
import sys, jax, numpy as np
from llmos_jax import data, interchange

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

opened = interchange.open_archive(sys.argv[1])
np.asarray(jax.jit(lambda x: x + 1)(np.float32(1)))
before = status("VmRSS")
params = opened.params()
total = sum(x.nbytes for x in params.values())
peaks = [status("VmHWM")]
interchange.write_huggingface(
    sys.argv[2], opened.skeleton.spec, params, data.bytes_tokenizer()
)
peaks.append(status("VmHWM"))
print(total, *((peak - before) / total for peak in peaks))
"""


def _sparse(folder: Path) -> Path:
    """A model of zeros that takes no room on the disk."""
    spec = spec_of(CONFIG, "m")
    rows = [
        (name, np.dtype(np.float32), entry.foreign_shape(spec))
        for entry in weight_map(spec, architecture_of(spec))
        for name, _ in tensors_of(entry, spec)
    ]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    file = folder / "model.safetensors"
    head = header_bytes(rows)
    file.write_bytes(head)
    os.truncate(file, len(head) + 4 * sum(int(np.prod(shape)) for *_, shape in rows))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts with procfs")
def test_peak_memory_is_at_most_130_percent_of_the_weights(tmp_path):
    words = ["-c", MEASURE, str(_sparse(tmp_path / "m")), str(tmp_path / "out")]
    output, errors = small.start(words, devices=1).communicate(timeout=120)
    assert output, errors
    total, *peaks = map(float, output.split())
    assert total > 5e8
    assert max(peaks) < ALLOWED, peaks
