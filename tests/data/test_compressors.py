"""The figures to beat are those of the command line tools."""

from __future__ import annotations

import inspect
import shutil
import subprocess

import pytest

from llmos_jax.data import compare
from llmos_jax.errors import DataError

RAW = inspect.getsource(inspect).encode()
HEADER_BYTES = 64


@pytest.mark.parametrize("tool", ["gzip", "xz"])
def test_figures_are_the_tools(tool):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    packed = subprocess.run(
        [tool, "-9", "-c"], input=RAW, capture_output=True, check=True
    ).stdout
    ours = compare(RAW)[f"{tool}_bits_per_byte"] * len(RAW) / 8
    assert abs(ours - len(packed)) <= HEADER_BYTES


def test_nothing_to_compress_is_an_error():
    with pytest.raises(DataError, match="no text"):
        compare(b"")
