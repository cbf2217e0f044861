"""The page at `/`, as a real browser shows it: live state, and a chat that streams."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from classifiers import LABELS, classifying
from serving_here import served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.routing import Route

from llmos_jax.data import bytes_tokenizer
from llmos_jax.server import page

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
LATENCY = {
    "buckets": [
        {"le": 0.01, "count": 0}, {"le": 0.05, "count": 30}, {"le": 0.1, "count": 70},
        {"le": 0.5, "count": 95}, {"le": 1.0, "count": 100}, {"le": None, "count": 100},
    ],
    "count": 100,
    "sum": 9.0,
}  # fmt: skip
NONE = {"buckets": [{"le": 1.0, "count": 0}, {"le": None, "count": 0}], "count": 0}
MARKUP = '<img src=x onerror="document.title=1"> **bold** '


class Fake:
    """A server whose state grows by 500 tokens a second."""

    def __init__(self):
        self.asked: list[dict] = []
        self.key = ""
        self.waits = threading.Event()
        self.was_left = threading.Event()
        self.start = time.monotonic()
        self.state = {
            "stage": "ready", "problem": "", "running": 3, "waiting": 2,
            "waiting_tokens": 70, "pages_held": 128, "pages_cached": 64,
            "tokens_per_s": 500.0, "bandwidth": 6e9, "planned_bandwidth": 8e9,
            "prompt_tokens": 900, "prefix_queries": 800, "prefix_hits": 600,
            "preemptions": 4, "steps": 50, "step_s": 2.5, "host_s": 0.25,
            "predicted_s": 2.0, "drafted_tokens": 0, "accepted_tokens": 0,
            "unplanned_compiles": 0, "programs": 6,
        }  # fmt: skip

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self._page),
                Route("/state", self._state),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    async def _page(self, _: Request):
        return HTMLResponse(page.page(), headers=page.headers())

    def _is_locked(self, http: Request) -> bool:
        said = http.headers.get("authorization")
        return bool(self.key) and said != f"Bearer {self.key}"

    async def _state(self, http: Request):
        if self._is_locked(http):
            return JSONResponse({"error": {"message": "no key"}}, 401)
        seconds = time.monotonic() - self.start
        return JSONResponse(
            {
                "model": "small-model",
                "limits": {"context": 2048, "seats": 8, "page_size": 16, "pages": 512,
                           "max_queue": 32, "max_queued_tokens": 9, "vocab_size": 9},
                "state": {**self.state, "generated_tokens": int(500 * seconds)},
                "is_draining": False,
                "latency": {"ttft": LATENCY, "itl": NONE},
            }
        )  # fmt: skip

    async def _chat(self, http: Request):
        body = await http.json()
        self.asked.append(body)
        if self._is_locked(http):
            message = "this server wants an API key."
            return JSONResponse({"error": {"message": message}}, 401)
        said = body["messages"][-1]["content"]
        return StreamingResponse(self._answer(said), media_type="text/event-stream")

    async def _answer(self, said: str):
        def event(data) -> str:
            return f"data: {json.dumps(data)}\n\n"

        def delta(text: str) -> str:
            return event({"choices": [{"index": 0, "delta": {"content": text}}]})

        try:
            yield event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
            yield ": a comment\n\n"
            for part in ("You said: ", MARKUP, said, " é"):
                half = len(delta(part)) // 2
                yield delta(part)[:half]
                await asyncio.sleep(0.01)
                yield delta(part)[half:]
            if said == "fail":
                yield event({"error": {"message": "the engine stopped."}})
            while said == "wait":
                self.waits.set()
                await asyncio.sleep(0.01)
            yield "data: [DONE]\n\n"
        finally:
            self.was_left.set()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: the page was not seen"
    )
    if BROWSER is None:
        pytest.skip("no Chromium here: the page was not seen")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=SWITCHES)
        yield opened
        opened.close()


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    one = Fake()
    config = uvicorn.Config(one.app(), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield one, f"http://127.0.0.1:{port}/"
    server.should_exit = server.force_exit = True
    thread.join(10)


@pytest.fixture
def seen(browser, fake):
    """The page, opened; it must neither complain nor fetch from elsewhere."""
    server, address = fake
    tab = browser.new_page()
    complaints: list[str] = []
    tab.on("pageerror", lambda fault: complaints.append(str(fault)))
    tab.on(
        "console",
        lambda one: complaints.append(one.text) if _is_fault(one) else None,
    )
    asked: list[str] = []
    tab.on("request", lambda one: asked.append(one.url))
    tab.goto(address)
    yield server, tab
    assert complaints == []
    assert all(one.startswith((address, "data:")) for one in asked)
    tab.close()


def _is_fault(message) -> bool:
    """401 and the like are told by the browser too, and are meant."""
    return message.type == "error" and "Failed to load resource" not in message.text


def waits_for(tab, name: str, text: str) -> None:
    tab.locator(f"#{name}", has_text=re.compile(text)).wait_for(timeout=8000)


def say(tab, text: str) -> None:
    tab.get_by_label("Message").fill(text)
    tab.get_by_label("Message").press("Enter")


def test_the_page_needs_nothing_from_elsewhere():
    text = page.page()
    assert not re.search(r'(?:src|href)="(?!data:)|url\(|@import|innerHTML', text)
    assert not re.search(r"\son[a-z]+=|style=", text)
    assert text.count("<script>") == text.count("<style>") == 1


def test_the_policy_allows_no_script_but_its_own():
    policy = page.headers()["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert re.search(r"script-src 'sha256-[\w+/]{43}='(;|$)", policy)


def test_it_shows_the_state_live(seen):
    _, tab = seen
    for name, text in {
        "model": "^small-model$", "stage": "^ready$", "running": "^3$",
        "waiting": "2 waiting, room for 32", "bandwidth": "^75$",
        "bandwidth-note": r"6\.00 GB/s of 8\.00 GB/s", "hits": "^75 %$",
        "held": r"held 2,048 tokens \(25 %\)", "cached": r"1,024 tokens \(13 %\)",
        "free": r"5,120 tokens \(63 %\)", "step": r"50\.0 ms", "planned": r"40\.0 ms",
        "host": "^10 %$", "preemptions": "^4$", "unplanned": "^0$",
        "ttft-note": "half ≤ 100 ms, 95 % ≤ 500 ms", "itl-note": "nothing measured",
        "speed": r"^(4[5-9]\d|5[0-4]\d)$",
    }.items():  # fmt: skip
        waits_for(tab, name, text)
    assert tab.title() == "small-model · llmos"
    assert tab.locator("#ttft rect").count() >= 5
    assert tab.locator("#cache-bar").get_attribute("aria-label") == (
        "Pages: 128 held, 64 cached, 320 free"
    )


def test_it_says_what_is_wrong(seen):
    server, tab = seen
    server.state.update(stage="failed", problem="the device is lost.")
    waits_for(tab, "stage", "failed")
    waits_for(tab, "problem", "the device is lost")
    server.state.update(stage="ready", problem="", planned_bandwidth=0.0)
    server.state.update(unplanned_compiles=2)
    waits_for(tab, "stage", "ready")
    waits_for(tab, "bandwidth", r"^6\.00$")
    waits_for(tab, "unplanned", "^2$")
    assert not tab.locator("#problem").is_visible()
    assert "alarm" in tab.locator("#unplanned").get_attribute("class")


def test_a_chat_streams_text_and_keeps_the_conversation(seen):
    server, tab = seen
    waits_for(tab, "stage", "ready")
    say(tab, "hello")
    tab.locator("#log .assistant", has_text="hello é").wait_for()
    tab.locator("#send").wait_for(state="visible")
    assert tab.locator("#log .assistant").inner_text() == f"You said: {MARKUP}hello é"
    assert tab.locator("#log img").count() == 0
    say(tab, "again")
    tab.locator("#log .assistant").nth(1).get_by_text("again é").wait_for()
    last = server.asked[-1]
    assert last["stream"] is True and last["model"] == "small-model"
    assert [one["role"] for one in last["messages"]] == ["user", "assistant", "user"]
    tab.get_by_role("button", name="New conversation").click()
    assert tab.locator("#log .user").count() == 0


def test_stop_ends_an_answer_and_keeps_what_was_said(seen):
    server, tab = seen
    say(tab, "wait")
    assert server.waits.wait(8)
    tab.get_by_role("button", name="Stop").click()
    assert server.was_left.wait(8)
    tab.get_by_role("button", name="Send").wait_for()
    assert "wait" in tab.locator("#log .assistant").inner_text()
    assert tab.locator("#log .error").count() == 0


def test_an_error_is_shown_within_an_answer_and_before_one(seen):
    server, tab = seen
    say(tab, "fail")
    waits_for(tab, "log", "the engine stopped")
    server.key = "secret"
    say(tab, "hello")
    waits_for(tab, "log", "this server wants an API key")
    waits_for(tab, "stage", "locked")
    assert "stale" in tab.locator("#cards").get_attribute("class")
    tab.get_by_label("API key").fill("secret")
    waits_for(tab, "stage", "ready")
    say(tab, "with key")
    tab.locator("#log .assistant", has_text="with key é").wait_for()
    assert tab.evaluate("localStorage.length + sessionStorage.length") == 0


def test_shift_and_enter_break_the_line(seen):
    server, tab = seen
    box = tab.get_by_label("Message")
    box.fill("a")
    box.press("Shift+Enter")
    assert box.input_value() == "a\n" and server.asked == []


@pytest.mark.parametrize("width", [320, 390, 800, 1400])
def test_no_width_needs_a_sideways_scroll(seen, width):
    _, tab = seen
    tab.set_viewport_size({"width": width, "height": 800})
    waits_for(tab, "stage", "ready")
    say(tab, "x" * 300)
    tab.locator("#log .assistant", has_text="x é").wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(seen, scheme):
    _, tab = seen
    tab.emulate_media(color_scheme=scheme)
    names = ("card", "ink", "quiet", "bad", "good")
    colours = tab.evaluate(
        "(names) => names.map((one) => getComputedStyle(document.documentElement)"
        ".getPropertyValue('--' + one).trim())",
        list(names),
    )
    card, *inks = map(_luminance, colours)
    assert (card > 0.5) is (scheme == "light")
    for ink in inks:
        high, low = max(card, ink), min(card, ink)
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.2, 1.4.3


def _luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, by WCAG 2.2."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * one for one in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [
        one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4
        for one in parts
    ]
    return sum(share * one for share, one in zip((0.2126, 0.7152, 0.0722), linear))


def test_every_control_has_a_name(seen):
    _, tab = seen
    waits_for(tab, "stage", "ready")
    unnamed = tab.evaluate(
        "Array.from(document.querySelectorAll('button, input, textarea, [role=img]'))"
        ".filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent"
        ".trim())).map((one) => one.id)"
    )
    assert unnamed == []


def test_a_classifier_shows_classes_as_bars_and_no_chat(browser):
    with classifying(seats=1, context=16) as engine:
        with served(engine, tokenizer=bytes_tokenizer()) as (address, _):
            tab = browser.new_page(viewport={"width": 390, "height": 800})
            problems: list[str] = []
            tab.on("pageerror", lambda problem: problems.append(str(problem)))
            tab.goto(address)
            waits_for(tab, "stage", "ready")
            waits_for(tab, "room", "4 classes, texts of up to 16 tokens")
            assert not tab.locator("#chat").is_visible()
            assert not tab.locator("#h-cache").is_visible()
            tab.get_by_label("Text").fill("what is it?")
            tab.get_by_role("button", name="Classify").click()
            tab.locator("#classes li").nth(3).wait_for()
            shares = tab.locator("#classes span").all_inner_texts()
            numbers = [float(one.removesuffix(" %")) for one in shares]
            assert numbers == sorted(numbers, reverse=True)
            assert sum(numbers) == pytest.approx(100, abs=0.3)
            assert sorted(tab.locator("#classes b").all_inner_texts()) == sorted(LABELS)
            tab.get_by_label("Text").fill("x" * 30)
            tab.get_by_label("Text").press("Enter")
            tab.locator("#classify-note.error", has_text="30 tokens").wait_for()
            assert tab.locator("#classes li").count() == 0
            wide = tab.evaluate("document.documentElement.scrollWidth")
            assert wide <= 390 and problems == []
            tab.close()
