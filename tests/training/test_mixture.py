"""A run on a corpus and text goes on elsewhere as if it had never stopped."""

from __future__ import annotations

import json

import numpy as np
import pytest
import small
from conftest import FLOAT32_RELATIVE
from corpora import TEXTS, make_corpus
from processes import TRAIN, copy_until


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """A corpus, and a file of text."""
    folder = tmp_path_factory.mktemp("entries")
    lines = [json.dumps({"text": f"{n} hum de dum de {n}"}) for n in range(200)]
    (folder / "hums.jsonl").write_text("\n".join(lines))
    return [str(make_corpus(folder / "corpus", TEXTS)), str(folder / "hums.jsonl")]


@pytest.fixture(scope="module")
def asked(entries, small_model):
    """Folder -> `--set` texts of a 20-step run, saved at 10."""

    def texts(folder):
        more = {"data__weights": "[1, 2]", "data__tokenizer": "auto"}
        given = small.overrides(folder, small_model, json.dumps(entries), **more)
        return [*given, "data.validation_share=0.1"]

    return texts


@pytest.fixture(scope="module")
def on_one_device(asked, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("one") / "run"
    process = small.start(["-c", TRAIN, *small.flags(asked(folder))], devices=1)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-2000:]
    return folder


@pytest.mark.slow
def test_packed_text_is_trained_on(asked, tmp_path, capsys):
    """As text with a document mask is: a loss that is a little lower after 8 steps."""
    texts = [*asked(tmp_path / "run"), "data.packing=best_fit", "train.steps=8"]
    report = small.train(texts)
    assert "documents in" in capsys.readouterr().err
    losses = small.losses(tmp_path / "run")
    assert len(losses) == report["steps"] == 8
    assert losses[-1] < losses[0] < 7, "log(512) is 6.2"
    assert report["val_bits_per_byte"] > 0


def test_a_mixture_goes_on_on_eight_devices(asked, on_one_device, tmp_path, entries):
    folder = copy_until(on_one_device, tmp_path / "run", 10)
    report = small.train(asked(folder))
    assert (report["resumed_from"], report["steps"]) == (10, 20)
    found, wanted = small.losses(folder), small.losses(on_one_device)
    assert len(found) == 20
    np.testing.assert_allclose(found, wanted, rtol=FLOAT32_RELATIVE)
    corpus, hums = report["data"]["sources"]
    assert [corpus["name"], hums["name"]] == entries
    assert corpus["tokens_seen"] + hums["tokens_seen"] == report["tokens_seen"]
    assert hums["epochs"] == hums["tokens_seen"] / hums["tokens"] > 0
