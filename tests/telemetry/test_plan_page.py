"""The pages of a plan and of a front: whole, escaped, self-contained, and seen."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from llama_table import table_of

from llmos_jax.hardware import legal_topologies
from llmos_jax.ir import Pins, Prices, Workload
from llmos_jax.planner import (
    RESOURCES,
    budget,
    frontier,
    neighbour_way,
    neighbours,
    plan,
    why_runner_up_lost,
)
from llmos_jax.rules import load_rules
from llmos_jax.telemetry import page_of_front, page_of_plan
from llmos_jax.telemetry.plan_figures import _scale, part_colours

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
WORK = Workload(global_batch=64, seq_len=2048)
COMPILED = {
    "fidelity": "compile",
    "peak_hbm_bytes": 34e9,
    "argument_bytes": 6e9,
    "temp_bytes": 28e9,
    "compile_s": 12.0,
    "jax": "0.10.2",
    "libtpu": "0.0.42",
    "collectives": [
        {"op": "all-gather", "axes": ["fsdp"], "link": "ici", "count": 96, "bytes": 5e9}
    ],
    "unplanned_collectives": [
        {"op": "all-to-all", "axes": ["fsdp", "tensor"], "link": "dcn", "count": 2,
         "bytes": 9e6, "why": "no <rule> asks for it"},
    ],
}  # fmt: skip


def page_of(compiled=None, pins=None, **changes) -> str:
    found = plan(table_of("llama3_8b"), "v6e:4x4", WORK, "llama", pins)
    found = replace(found, compiled=compiled, **changes)
    return page_of_plan(
        found,
        budget_bytes=budget(found.topology),
        neighbours=[(one, neighbour_way(found, one)) for one in neighbours(found)],
        why_lost=why_runner_up_lost(found),
        resources=RESOURCES,
        reasons=["3 memory: needs 40 GiB > 29.7 GiB"],
        config_toml='model = "a<b"',
        versions={"jax": "0.10.2"},
    )


def front_of(prices: dict[str, float]) -> str:
    machines = [one for chip in ("v5e", "v6e") for one in legal_topologies(chip, 64)]
    return page_of_front(
        frontier(
            table_of("llama3_8b"),
            machines,
            WORK,
            load_rules("llama"),
            Pins(),
            Prices(usd_per_chip_hour=prices, source="made <up>"),
        )
    )


PAGES = {
    "estimate": lambda: page_of(),
    "compiled": lambda: page_of(COMPILED),
    "alone": lambda: page_of(runner_up=None, others=()),
    "front": lambda: front_of({"v5e": 1.2, "v6e": 2.7}),
    "front without prices": lambda: front_of({}),
}


@pytest.fixture(scope="module", params=PAGES)
def page(request) -> str:
    return PAGES[request.param]()


def test_the_page_fetches_nothing_and_runs_nothing(page):
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)|@import', page)
    assert all((a or b).startswith("#") for a, b in links)
    assert "<script" not in page and "http" not in page


def test_every_tag_is_closed_and_ids_are_unique(page):
    open_tags: list[str] = []
    void = {"meta", "br", "rect", "line", "circle"}

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in void:
                open_tags.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            if tag not in void:
                assert open_tags.pop() == tag

    checker = Checker()
    checker.feed(page)
    checker.close()
    assert open_tags == []
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_drawings_name_themselves_and_take_the_colours_of_the_page(page):
    drawings = re.findall(r"<svg role=.*?</svg>", page, re.S)
    assert drawings
    for drawing in drawings:
        assert "aria-label=" in drawing
        assert not re.search(r"#[0-9a-f]{6}", drawing)
        assert "nan" not in drawing and "inf%" not in drawing


def test_a_plan_says_how_stages_and_keys_take_turns_where_there_are_any():
    axes = {"stage": 2, "context": 2}
    pins = Pins(mesh=axes, schedule="1f1b", context_exchange="ring")
    page = page_of(pins=pins)
    assert re.search(r"1f1b, bubble \d+%", page) and "ring (passed on" in page
    assert "bubble" not in page_of() and "keys of others" not in page_of()


def test_a_plan_shows_what_was_chosen_and_what_else_would_work():
    page = page_of()
    for text in (
        "llama3_8b on v6e:4x4",
        "Where the time goes",
        "What else would work",
        "Why it lost",
        "batch x2 (128)",
        "Not compiled",
        "model = &#34;a&lt;b&#34;",
        "prefers-color-scheme: dark",
    ):
        assert text in page


def test_a_compiled_plan_shows_the_compiler_and_shouts():
    page = page_of(COMPILED)
    assert "compiler (compile)" in page and "does not fit" in page
    assert "1 collective of the compiled step was not planned" in page
    assert "no &lt;rule&gt; asks for it" in page
    assert "Not compiled" not in page


def test_a_front_numbers_its_rows_in_the_plot():
    page = front_of({"v5e": 1.2, "v6e": 2.7})
    rows = len(re.findall(r'class="muted number">', page))
    numbers = re.findall(r'class="inside"[^>]*>(\d+)<', page)
    assert rows > 1 and sorted(map(int, numbers)) == list(range(1, rows + 1))
    assert "made &lt;up&gt;" in page


def test_a_front_without_prices_counts_chip_hours():
    page = front_of({})
    assert "chip-hours per million tokens" in page and "no cost: v5e, v6e" in page


def test_parts_that_stay_are_blue_and_parts_that_pass_are_orange():
    found = part_colours({"params": 1.0, "optimizer": 2.0, "logits": 3.0, "free": 0.0})
    assert found == {
        "params": "var(--kept-0)",
        "optimizer": "var(--kept-1)",
        "logits": "var(--made-0)",
    }


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [2.0, 3.0], [1e-3, 1e3]])
def test_a_scale_holds_its_values_and_has_ticks(values, log):
    scale = _scale(values, log=log)
    assert all(0 <= scale.place(value) <= 1 for value in values)
    assert all(0 <= scale.place(tick) <= 1 for tick in scale.ticks)
    assert 1 <= len(scale.ticks) < 25


def browse(*words: str) -> str:
    if BROWSER is None:
        pytest.skip("no Chromium here: how the page looks was not tested")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *words],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["compiled", "front"])
def test_a_browser_shows_it_without_a_sideways_scroll(name, tmp_path):
    """At the width of a phone, a tablet and a screen."""
    widths = (360, 800, 1400)
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border: 0" '
        f'srcdoc="{html.escape(PAGES[name]())}"></iframe>'
        for width in widths
    )
    measure = """<script>onload = () => { document.title = Array.from(window).map(
        (one) => one.document.documentElement.scrollWidth).join(" "); }</script>"""
    path = tmp_path / "frames.html"
    path.write_text(f"<!doctype html><title></title>{frames}{measure}")
    shown = browse("--dump-dom", f"file://{path}")
    found = re.search(r"<title>([\d ]+)</title>", shown)
    assert found, shown[:400]
    for measured, width in zip(found[1].split(), widths, strict=True):
        assert int(measured) <= width


@pytest.mark.parametrize(
    ("settings", "dark"),
    [("preferredColorScheme=1", False), ("preferredColorScheme=0", True)],
)
def test_a_browser_paints_it_light_and_dark(settings, dark, tmp_path):
    from matplotlib.image import imread

    path, shot = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(page_of(COMPILED))
    browse(
        f"--blink-settings={settings}",
        f"--screenshot={shot}",
        "--window-size=900,1400",
        "--hide-scrollbars",
        f"file://{path}",
    )
    pixels = imread(shot)[..., :3]
    assert bool(pixels[2, 2].mean() < 0.2) is dark
    colours = {tuple(pixel) for pixel in (pixels[::7, ::7].reshape(-1, 3) * 255) // 8}
    assert len(colours) > 20, "figures and text are there"


def test_the_browser_is_named():
    assert BROWSER is None or Path(BROWSER).exists()
