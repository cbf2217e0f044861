"""metrics.jsonl and TensorBoard events: each step once, whatever happened before."""

import json
import math
from pathlib import Path

import pytest

from llmos_jax.errors import DataError, TrainingError
from llmos_jax.telemetry import MetricsWriter, read_metrics


def write_steps(folder, first, last, *, resume_step=0):
    with MetricsWriter(folder, resume_step=resume_step) as writer:
        for step in range(first, last + 1):
            writer.write({"step": step, "loss": 1.0 / step})


def steps(folder):
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl")]


def read_events(folder):
    """(step, tag, value) of every scalar in the event files, by the TFRecord format."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.glob("tensorboard/events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            at += size + 16
    return found


def test_rows_come_back_as_written(tmp_path):
    rows = [{"step": 1, "loss": 2.5, "note": "warm"}, {"step": 2, "loss": 2.25}]
    with MetricsWriter(tmp_path / "run") as writer:
        for row in rows:
            writer.write(row)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == rows


def test_a_row_is_on_disk_before_close(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": 2.5})
    assert steps(tmp_path) == [1]
    writer.close()
    writer.close()


def test_resume_drops_later_rows(tmp_path):
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 5, 6, resume_step=4)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_resume_keeps_rows_without_a_step(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"note": "started"})
    write_steps(tmp_path, 1, 1)
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == {"note": "started"}


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    write_steps(tmp_path, 1, 3)
    write_steps(tmp_path, 1, 1)
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}'])
def test_a_line_without_its_end_is_dropped(tmp_path, torn):
    write_steps(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert steps(tmp_path) == [1, 2]
    write_steps(tmp_path, 3, 3, resume_step=3)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"line 2 is not a JSON object: '\[2\]'"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_no_file_means_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_number_that_is_none_is_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "loss": math.nan, "lr": math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "loss": None, "lr": None}
    assert read_events(tmp_path) == []


def test_scalars_reach_tensorboard(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 3, "loss": 2.5, "lr": 0.5, "note": "text"})
    assert read_events(tmp_path) == [(3, "loss", 2.5), (3, "lr", 0.5)]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(TrainingError, match=r"cannot write .*run.*--set run\.dir"):
        MetricsWriter(tmp_path / "run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_error(tmp_path):
    with pytest.raises(TrainingError, match="No space left on device"):
        with MetricsWriter(tmp_path) as writer:
            writer._file.close()
            writer._file = Path("/dev/full").open("wb", buffering=0)
            writer.write({"step": 1})
