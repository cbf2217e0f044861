#!/usr/bin/env python3
"""Classifiers of sentences beside TF-IDF with logistic regression, on the same splits.

    .venv/bin/python tools/bench/classify.py --data DIR [--only trec sst2 subj]
        [--models baseline lstm transformer backbone] [--seeds 3] [--json]

DIR holds TREC.train.all, TREC.test.all, stsa.binary.{train,dev,test} and subj.all:
lines of `label text`. TREC and SST-2 come with a test part; of Subj the last tenth of a
seeded shuffle is it. TREC and Subj have no validation part: a tenth of the training
rows is. All contenders read the same files, repaired alike.

The baseline is scikit-learn's: TF-IDF of words and pairs of words, sublinear, and in a
second variant of 2 to 5 characters within words beside them; C of the logistic
regression and the variant that stands for the baseline are chosen on the validation
part. Then it is fitted to training and validation rows together, but for SST-2, whose
validation part is given. It has no seed. Get it: pip install scikit-learn.

Ours are trained by `llmos train` with configs/classify/*.toml, once for each seed.
Test accuracy and macro F1 are of the test part, which nothing was chosen by.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from llmos_jax.config.schema import DataSection
from llmos_jax.data.labelled.read import Row, read_rows
from llmos_jax.data.labelled.sides import hold_out
from llmos_jax.errors import LlmosError

CONFIGS = {
    "lstm": "configs/classify/lstm.toml",
    "transformer": "configs/classify/transformer.toml",
    "backbone": "configs/classify/backbone.toml",
}
TARGETS = {
    "trec": {"lstm": 0.88, "transformer": 0.88, "backbone": 0.95},
    "sst2": {"lstm": 0.79, "transformer": 0.79, "backbone": 0.88},
    "subj": {"lstm": 0.90, "transformer": 0.90, "backbone": 0.94},
}
"""Test accuracy that is aimed at."""
BACKBONE = pathlib.Path("~/.cache/llmos-models/smollm2/hf").expanduser()
"""Where tools/get-model puts SmolLM2-135M."""
MINUTES = 90
"""A run that takes longer is given up."""
C_TRIED = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SHUFFLE = 0
"""Seed of the fixed 90/10 split of Subj."""
ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A data set's rows, and whether its validation part was cut from training."""

    parts: dict[str, list[Row]]
    is_cut: bool

    def texts(self, *names: str) -> list[str]:
        """The texts of some parts, end to end."""
        return [row.text for name in names for row in self.parts[name]]

    def labels(self, *names: str) -> list[str]:
        """The labels of the same."""
        return [row.label or "" for name in names for row in self.parts[name]]

    def write(self, folder: pathlib.Path) -> dict[str, pathlib.Path]:
        """Write lines of `label text`, a file for each part."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {}
        for name, rows in self.parts.items():
            files[name] = folder / f"{name}.txt"
            lines = "".join(f"{row.label} {row.text}\n" for row in rows)
            files[name].write_text(lines, encoding="utf-8")
        return files


def main() -> None:
    """Run all contenders on all data sets; print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=[*TARGETS])
    names = ("baseline", *CONFIGS)
    parser.add_argument("--models", nargs="+", choices=names, default=[*names])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.only:
            try:
                split = SPLITS[name](asked.data)
            except LlmosError as problem:
                sys.exit(f"error: {problem}")
            files = split.write(pathlib.Path(folder) / name)
            for model in asked.models:
                if model == "baseline":
                    rows += baseline(name, split)
                    continue
                runs = [
                    trained(model, files, seed, pathlib.Path(folder) / "runs")
                    for seed in range(asked.seeds)
                ]
                rows.append(row_of(name, model, runs))
    print(json.dumps({"rows": rows}) if asked.json else table(rows))


def read(*paths: pathlib.Path) -> list[Row]:
    """All rows of some files, repaired as the product repairs them."""
    notes: list[str] = []
    rows = read_rows(DataSection(), [*map(str, paths)], "train", notes)
    for note in notes:
        print(note, file=sys.stderr)
    return rows


def trec(data: pathlib.Path) -> Split:
    """Questions by what they ask for, six classes; the test part is given."""
    return cut(read(data / "TREC.train.all"), read(data / "TREC.test.all"))


def sst2(data: pathlib.Path) -> Split:
    """Sentences of film reviews, for or against; all parts are given."""
    sides = {"train": "train", "validation": "dev", "test": "test"}
    parts = {name: read(data / f"stsa.binary.{side}") for name, side in sides.items()}
    return Split(parts=parts, is_cut=False)


def subj(data: pathlib.Path) -> Split:
    """Sentences that tell a plot or an opinion; nine tenths are training rows."""
    rows = read(data / "subj.all")
    random.Random(SHUFFLE).shuffle(rows)
    last = len(rows) // 10
    return cut(rows[:-last], rows[-last:])


SPLITS = {"trec": trec, "sst2": sst2, "subj": subj}


def cut(rows: list[Row], test: list[Row]) -> Split:
    """Hold a tenth of the training rows out, as `data.validation_share` would."""
    train, validation = hold_out(rows, 0.1, [])
    parts = {"train": train, "validation": validation, "test": test}
    return Split(parts=parts, is_cut=True)


def baseline(name: str, split: Split) -> list[dict[str, Any]]:
    """Rows of both variants; the one that is better on the validation part stands for
    the baseline."""
    try:
        from sklearn.metrics import f1_score
    except ImportError:
        sys.exit("error: the baseline is scikit-learn's. pip install scikit-learn")
    rows = []
    for variant, vectors in vectorizers().items():
        begun = time.perf_counter()
        train = vectors.fit_transform(split.texts("train"))
        held_out = vectors.transform(split.texts("validation"))
        tried = {}
        for c in C_TRIED:
            model = regression(c).fit(train, split.labels("train"))
            tried[c] = model.score(held_out, split.labels("validation"))
        best = max(tried, key=lambda c: (tried[c], -c))
        parts = ("train", "validation") if split.is_cut else ("train",)
        inputs = vectors.fit_transform(split.texts(*parts))
        model = regression(best).fit(inputs, split.labels(*parts))
        said = model.predict(vectors.transform(split.texts("test")))
        truth = split.labels("test")
        run = {
            "test_accuracy": sum(a == b for a, b in zip(said, truth)) / len(truth),
            "test_macro_f1": float(f1_score(truth, said, average="macro")),
            "train_s": time.perf_counter() - begun,
        }
        chosen = {"C": best, "val_accuracy": tried[best]}
        rows.append(row_of(name, f"TF-IDF {variant}", [run]) | chosen)
        note(f"{name} TF-IDF {variant}: {run['test_accuracy']:.4f}, C {best}")
    best_row = max(rows, key=lambda row: row["val_accuracy"])
    for row in rows:
        row["is_baseline"] = row is best_row
    return rows


def vectorizers() -> dict[str, Any]:
    """What turns texts into numbers; words are what stands between spaces, since these
    sets are cut into words already."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union

    def words() -> Any:
        return TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+"
        )

    characters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True
    )
    return {"words": words(), "words, characters": make_union(words(), characters)}


def regression(c: float) -> Any:
    """Logistic regression, of all classes at once."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, max_iter=1000)


def trained(
    model: str, files: dict[str, pathlib.Path], seed: int, runs: pathlib.Path
) -> dict[str, float]:
    """Train one of ours; return its figures."""
    run = runs / f"{files['train'].parent.name}_{model}_{seed}"
    settings = {f"data.{name}": json.dumps([str(path)]) for name, path in files.items()}
    settings |= {"run.dir": str(run), "run.seed": str(seed)}
    if model == "backbone":
        settings["model"] = str(BACKBONE)
    command = [sys.executable, "-m", "llmos_jax.train", CONFIGS[model], "--json"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    begun = time.perf_counter()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60 * MINUTES,
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    report = json.loads(done.stdout)
    wall_s = time.perf_counter() - begun
    note(f"{run.name}: {report['test_accuracy']:.4f} in {wall_s:.0f} s")
    figures = {name: report[name] for name in ("test_accuracy", "test_macro_f1")}
    return {**figures, "train_s": report.get("train_s", wall_s), "wall_s": wall_s}


def row_of(name: str, model: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and spread (standard deviation) over the runs of a contender."""
    row: dict[str, Any] = {
        "data": name,
        "model": model,
        "seeds": len(runs),
        "target": TARGETS[name].get(model),
        "runs": runs,
    }
    for figure in ("test_accuracy", "test_macro_f1", "train_s"):
        values = [run[figure] for run in runs]
        row[figure] = statistics.mean(values)
        row[f"{figure}_spread"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Rows aligned; the baseline's is marked."""
    lines = [
        f"{'data':<6}{'model':<26}{'accuracy %':>16}{'target':>8}{'macro F1 %':>16}"
        f"{'train s':>9}"
    ]
    for row in rows:
        mark = " *" if row.get("is_baseline") else ""
        target = "" if row["target"] is None else f"{100 * row['target']:.0f}"
        lines.append(
            f"{row['data']:<6}{row['model'] + mark:<26}{percent(row, 'test_accuracy')}"
            f"{target:>8}{percent(row, 'test_macro_f1')}{row['train_s']:>9.0f}"
        )
    legend = "mean and standard deviation over seeds; * the baseline of its data set"
    return "\n".join([*lines, legend])


def percent(row: dict[str, Any], figure: str) -> str:
    """A mean in hundredths, with its spread where there are seeds."""
    mean, spread = 100 * row[figure], 100 * row[f"{figure}_spread"]
    several = f" +- {spread:4.2f}" if row["seeds"] > 1 else " " * 8
    return f"{f'{mean:.2f}{several}':>16}"


def note(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
