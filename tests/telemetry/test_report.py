"""report.html is one page that fetches nothing; report.json is what was given."""

import json
import re
from html.parser import HTMLParser

import pytest

from llmos_jax.errors import LlmosError
from llmos_jax.ir import (
    Candidate,
    Chip,
    Estimate,
    MeshShape,
    ParamRow,
    ParamTable,
    Plan,
    ReportRow,
    Rules,
    Topology,
    Way,
    Workload,
)
from llmos_jax.telemetry import Confusion, MetricsWriter, environment, write_report

VALUES = {
    "val_loss": 3.6,
    "val_bits_per_byte": 2.2,
    "gzip_bits_per_byte": 2.7,
    "final_loss": float("nan"),
}
ROWS = [ReportRow(name="Validation", value=2.2, unit="bits/byte", how="loss / <ln 2>")]


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.setattr(Plan, "explain", lambda self: "mesh  one device")
    chip = Chip(
        name="cpu",
        vendor="cpu",
        devices_per_chip=1,
        peak_flops_per_s={"float32": 2e11},
        hbm_bytes=16 * 2**30,
        hbm_bytes_per_s=2e10,
        link_bytes_per_s=1e10,
        torus_dims=0,
        dcn_bytes_per_s=1e9,
        matmul_efficiency=0.8,
        hbm_efficiency=0.8,
        link_efficiency=0.8,
        source="made up",
    )
    estimate = Estimate(
        step_s=0.3,
        peak_hbm_bytes=3e8,
        tflops_per_s_per_chip=0.08,
        mfu=0.4,
        tokens_per_s=6600,
        bound_by="compute",
        seconds={"compute": 0.3},
        memory={"params": 1e8, "activations": 2e8},
    )
    row = ParamRow(path="embed", shape=(64, 32), dtype="float32", axes=(None, None))
    return Plan(
        params=ParamTable(name="tiny<1>", rows=(row,)),
        topology=Topology(name="cpu:1", chip=chip, shape=(1,)),
        workload=Workload(global_batch=4, seq_len=128),
        rules=Rules(family="llama", weights={}, activations={}),
        chosen=Candidate(way=Way(mesh=MeshShape()), predicted=estimate),
        specs={"embed": (None, None)},
    )


SAID = (("def f(", "x):\n  </pre>"),)


def write(folder, plan, *, steps=20, samples=SAID, values=VALUES, confusion=None):
    with MetricsWriter(folder) as writer:
        for step in range(1, steps + 1):
            row = {"step": step, "loss": 8.0 / step, "tokens_per_s": 100.0}
            writer.write(row if step % 5 else row | {"val_loss": 8.5 / step})
    write_report(
        folder,
        values=values,
        rows=ROWS,
        plan=plan,
        config_toml='model = "tiny"',
        environment={"python": "3.11"},
        samples=samples,
        confusion=confusion,
    )
    return (folder / "report.html").read_text()


def test_the_page_fetches_nothing(tmp_path, plan):
    page = write(tmp_path, plan)
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert all((a or b).startswith("#") for a, b in links)
    assert "<script" not in page


def test_the_page_is_whole_and_escaped(tmp_path, plan):
    page = write(tmp_path, plan)
    for text in (
        "tiny&lt;1&gt;",
        "2.2 bits/byte",
        "loss / &lt;ln 2&gt;",
        "x):\n  &lt;/pre&gt;",
        "mesh  one device",
        "model = &#34;tiny&#34;",
        "Loss, bits per byte",
        "gzip 2.70",
        "prefers-color-scheme: dark",
    ):
        assert text in page
    parser = HTMLParser()
    parser.feed(page)
    parser.close()


def test_ids_are_unique(tmp_path, plan):
    ids = re.findall(r'\bid="([^"]*)"', write(tmp_path, plan))
    assert len(ids) == len(set(ids))


def test_report_json_keeps_values_and_order(tmp_path, plan):
    write(tmp_path, plan)
    found = json.loads((tmp_path / "report.json").read_text())
    assert list(found) == list(VALUES)
    assert found == VALUES | {"final_loss": None}


def test_plots_are_saved(tmp_path, plan):
    write(tmp_path, plan)
    for name in ("loss", "throughput", "memory"):
        data = (tmp_path / "plots" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")


def test_a_classifier_has_a_picture_and_a_table_of_its_classes(tmp_path, plan):
    assert "Which classes are confused" not in write(tmp_path, plan)
    confusion = Confusion(labels=("a<b", "c"), counts=((3, 1), (0, 1200)))
    page = write(
        tmp_path, plan, samples=(), values={"val_loss": 0.1}, confusion=confusion
    )
    assert "Which classes are confused" in page
    assert "Confusion matrix: 1,203 of 1,204 texts right" in page
    assert "Loss, nats per text" in page
    row = re.search(r"<tr><th>a&lt;b</th>(.*?)</tr>", page)[1]
    assert re.findall(r">([^<]+)</td>", row) == [
        "4", "100.0%", "75.0%", "85.7%", "c (1)",
    ]  # fmt: skip
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert (tmp_path / "plots" / "confusion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_short_run_has_a_report(tmp_path, plan, steps):
    assert "What it says" not in write(tmp_path, plan, steps=steps, samples=())


def test_an_unwritable_folder_is_an_error(tmp_path, plan):
    (tmp_path / "plots").write_text("a file")
    with pytest.raises(LlmosError, match="cannot write the report into"):
        write(tmp_path, plan)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2.31424, "bits/byte", "2.314 bits/byte"),
        (12345.6, "tokens/s", "12,346 tokens/s"),
        (4.59e14, "FLOP/s", "459T FLOP/s"),
        (0.412, "share", "41.2%"),
        (2**30, "bytes", "1.00 GiB"),
        (176.0, "s", "2m56s"),
        (600, "", "600"),
        ("full", "", "full"),
        (None, "s", "not measured"),
    ],
)
def test_a_row_is_shown_as_people_read_it(value, unit, text):
    assert ReportRow(name="x", value=value, unit=unit).text == text


def test_environment_is_text_and_names_this_python():
    found = environment()
    assert found["python"].startswith("3.")
    assert {"platform", "cpu", "cores", "memory", "jax"} <= set(found)
    assert all(isinstance(text, str) and text for text in found.values())
