"""The models that decode.py and quality.py compare: ours in few bits, llama.cpp's.

Not a bench of its own. All are made of the float model that tools/get-model finds.
"""

from __future__ import annotations

import pathlib
import subprocess
from dataclasses import dataclass

from workers import Worker, WorkerDied, note, peers_python

from llmos_jax import checkpoint, compression, driver, resolve
from llmos_jax.interchange import OpenedModel
from llmos_jax.ir import Quantization
from llmos_jax.models import Params
from llmos_jax.serving import Forward, open_forward

HERE = pathlib.Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How a model of ours is stored and run."""

    weights: Quantization
    cache: str = "float32"


MODES = {
    "int8": Mode(weights=Quantization()),
    "int8, int8 cache": Mode(weights=Quantization(), cache="int8"),
    "int8, int8 tokens": Mode(weights=Quantization(activations="int8")),
    "int8 group 32": Mode(weights=Quantization(group=32)),
    "int4 group 32": Mode(weights=Quantization(weights="int4", group=32)),
}


def model_file(name: str) -> pathlib.Path:
    """What tools/get-model NAME finds."""
    command = [str(HERE.parent / "get-model"), name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return pathlib.Path(done.stdout.strip())


def quantized(source: OpenedModel, how: Quantization) -> compression.Quantized:
    """A model with every weight rounded to the nearest number."""
    params = source.params(dtype="float32")
    return compression.quantize(
        source.skeleton, params, compression.How(quantization=how)
    )


def opened(made: compression.Quantized, mode: Mode) -> tuple[Forward, Params]:
    """What `generate` would run."""
    return open_forward(
        *(made.skeleton, dict(made.params)),
        compute_dtype="float32",
        kv_dtype=mode.cache,
    )


def save_int8(name: str, folder: str) -> None:
    """Write the int8 model as a checkpoint."""
    source = resolve.open_model(name)
    made = quantized(source, MODES["int8"].weights)
    checkpoint.save_model(
        *(folder, made.skeleton, made.params, source.tokenizer),
        made_by={"tools/bench": "few_bits.py"},
    )


def llama_files(
    source: pathlib.Path, folder: pathlib.Path, kinds: tuple[str, ...]
) -> dict[str, pathlib.Path]:
    """GGUF files of the float model's weights, as llama.cpp itself quantizes them.

    They come with "F32". Empty, and a line that says why, without llama.cpp.
    """
    python = peers_python("llama_cpp")
    if python is None:
        return {}
    files = {kind: folder / f"{kind}.gguf" for kind in ("F32", *kinds)}
    driver.convert(str(source), str(files["F32"]), kind="f32")
    worker = Worker(python, str(HERE / "llama_worker.py"))
    for kind in kinds:
        paths = {"source": str(files["F32"]), "out": str(files[kind])}
        worker.ask("quantize", kind=kind, **paths)
    worker.close()
    return files


def llama_worker(files: dict[str, pathlib.Path], threads: int) -> Worker:
    """llama.cpp with these files loaded, in the best form that works here.

    Its repacked weights ("extra buffers") are faster where they work; on some machines
    (AMX in a virtual one) they end the process.
    """
    python = peers_python("llama_cpp")
    assert python is not None
    for extra in (True, False):
        worker = Worker(python, str(HERE / "llama_worker.py"))
        try:
            for kind, path in files.items():
                asked = {"threads": threads, "extra_buffers": extra}
                worker.ask("load", name=kind, path=str(path), **asked)
                tokens = list(range(100, 116))
                worker.ask("prefill", name=kind, prompt=tokens, times=1)
                for batch in (1, 8):
                    prompts = [tokens] * batch
                    worker.ask("decode", name=kind, prompts=prompts, blocks=1, steps=1)
            return worker
        except WorkerDied as died:
            if not extra:
                raise
            note(f"llama.cpp runs without repacked weights, which it dies of: {died}")
    raise AssertionError("the second try returns or raises")
