"""Foreign models become our parameters, and back.

An `Archive` shows any file through Hugging Face's names. `families` turns config.json
into a ModelSpec and back, `weights` is the map between their tensors and our
parameters; `load_params` streams them onto a mesh and `write_huggingface` writes them.
"""

from llmos_jax.interchange.archive import Archive, OpenedModel, TensorFacts
from llmos_jax.interchange.families import architecture_of, config_of, spec_of
from llmos_jax.interchange.gguf_write import write_gguf
from llmos_jax.interchange.huggingface import HuggingFaceFolder
from llmos_jax.interchange.load import load_params, stored_dtypes
from llmos_jax.interchange.opened import (
    OpenedArchive,
    foreign_spec,
    inspect,
    is_foreign,
    open_archive,
)
from llmos_jax.interchange.peft import (
    Adapted,
    Adapter,
    merged,
    read_adapter,
    write_adapter,
)
from llmos_jax.interchange.probe import Likeness, likeness, probe
from llmos_jax.interchange.progress import ByteProgress
from llmos_jax.interchange.safetensors_file import (
    Stored,
    array_dtype,
    header_bytes,
    read_header,
)
from llmos_jax.interchange.weights import Entry, weight_map
from llmos_jax.interchange.write import foreign_tensors, write_huggingface

__all__ = [
    "Adapted",
    "Adapter",
    "Archive",
    "ByteProgress",
    "Entry",
    "HuggingFaceFolder",
    "Likeness",
    "OpenedArchive",
    "OpenedModel",
    "Stored",
    "TensorFacts",
    "architecture_of",
    "array_dtype",
    "config_of",
    "foreign_spec",
    "foreign_tensors",
    "header_bytes",
    "inspect",
    "is_foreign",
    "likeness",
    "load_params",
    "merged",
    "open_archive",
    "probe",
    "read_adapter",
    "read_header",
    "spec_of",
    "stored_dtypes",
    "weight_map",
    "write_adapter",
    "write_gguf",
    "write_huggingface",
]
