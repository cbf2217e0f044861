"""A confusion matrix can be read by eye, by mouse and as a table; labels are text."""

import re
import xml.etree.ElementTree as ET

import pytest

from llmos_jax.telemetry import class_rows, confusion_figure

THREE = ("NUM", "LOC", "HUM")
COUNTS = ((8, 2, 0), (1, 9, 0), (0, 0, 0))


def drawn(labels, counts):
    svg = confusion_figure(labels, counts).svg
    return svg, ET.fromstring(svg)


def texts(root):
    return [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")]


def tooltips(root):
    return {one.text for one in root.iter("{http://www.w3.org/2000/svg}title")}


def test_cells_tell_counts_and_shares_of_their_row():
    svg, root = drawn(THREE, COUNTS)
    assert 'aria-label="Confusion matrix: 17 of 20 texts right"' in svg
    assert tooltips(root) == {
        "NUM, called NUM: 8 texts, 80.0% of its row",
        "NUM, called LOC: 2 texts, 20.0% of its row",
        "LOC, called NUM: 1 texts, 10.0% of its row",
        "LOC, called LOC: 9 texts, 90.0% of its row",
    }
    assert {"8", "80%", "2", "20%", "true", "predicted"} <= set(texts(root))


def test_right_is_blue_and_wrong_is_vermilion_in_the_colours_of_the_page():
    svg, _ = drawn(THREE, COUNTS)
    right = svg.split("cell-0-0", 1)[1][:400]
    wrong = svg.split("cell-0-1", 1)[1][:400]
    assert "var(--first, #0072b2)" in right
    assert "var(--second, #d55e00)" in wrong
    strong, weak = (
        float(re.search(r"opacity: ([\d.]+)", one)[1]) for one in (right, wrong)
    )
    assert strong > 3 * weak
    assert "var(--page, #fefefe)" in svg


@pytest.mark.parametrize("size", [2, 12, 13, 50])
def test_every_class_up_to_fifty_is_named(size):
    counts = [[3 if i == j else 0 for j in range(size)] for i in range(size)]
    _, root = drawn([f"kind {i}" for i in range(size)], counts)
    named = texts(root)
    assert all(named.count(f"kind {i}") == 2 for i in range(size))


def test_of_more_the_ones_with_mistakes_are_drawn():
    size = 60
    counts = [[5 if i == j else 0 for j in range(size)] for i in range(size)]
    counts[59][58] = 7
    svg, root = drawn([f"kind {i}" for i in range(size)], counts)
    named = texts(root)
    assert named.count("kind 59") == named.count("kind 58") == 2
    assert named.count("(others)") == 2
    assert "kind 59, called kind 58: 7 texts, 58.3% of its row" in tooltips(root)
    assert "(others), called (others): 55 texts, 100.0% of its row" in tooltips(root)
    assert "300 of 307" in svg


def test_labels_are_text_and_not_markup():
    hard = ["<script>&\"'", "$x^2$", "a\n\x00b", "", "w" * 99, "\u732b"]
    counts = [[1] * len(hard) for _ in hard]
    svg, root = drawn(hard, counts)
    assert "<script" not in svg
    assert {"<script>&\"'", "$x^2$", "a b", "(empty)", "w" * 23 + "\u2026"} <= set(
        texts(root)
    )


def test_a_row_tells_what_a_class_is_taken_for():
    num, loc, hum = class_rows(THREE, COUNTS)
    assert num == {
        "label": "NUM",
        "texts": 10,
        "precision": pytest.approx(8 / 9),
        "recall": 0.8,
        "f1": pytest.approx(16 / 19),
        "taken_for": ("LOC", 2),
    }
    assert loc["precision"] == pytest.approx(9 / 11)
    assert hum["f1"] == hum["precision"] == hum["recall"] == 0.0
    assert hum["taken_for"] is None


def test_rows_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    true = [0, 0, 0, 1, 1, 2, 2, 2, 2]
    said = [0, 1, 0, 1, 1, 0, 2, 2, 1]
    counts = metrics.confusion_matrix(true, said).tolist()
    wanted = metrics.precision_recall_fscore_support(true, said)
    rows = class_rows(THREE, counts)
    for name, values in zip(("precision", "recall", "f1", "texts"), wanted):
        assert [row[name] for row in rows] == pytest.approx(list(values))


@pytest.mark.parametrize("counts", [[], [[1, 2]], [[1], [2]]])
def test_counts_must_be_square(counts):
    with pytest.raises(ValueError, match="2 labels need 2 rows of 2 counts"):
        confusion_figure(["a", "b"], counts)
