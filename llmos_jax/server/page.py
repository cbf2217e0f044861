"""The page at `/`: what the engine does, live, and a box to try the model: a chat, or
for a classifier a text whose classes are shown as bars.

One file without a build step that fetches nothing from elsewhere. Its script and its
style are allowed by their hashes, so that nothing else can run in it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources


@functools.cache
def page(*, is_classifier: bool = False) -> str:
    """Return the page as HTML; what it shows hangs on one attribute of it."""
    text = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    serves = "classes" if is_classifier else "tokens"
    return text.replace("<html ", f'<html data-serves="{serves}" ', 1)


@functools.cache
def _policy() -> str:
    parts = {
        "default-src": "'none'",
        "script-src": _hashes("script"),
        "style-src": _hashes("style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in parts.items())


def headers() -> dict[str, str]:
    """Return the headers that the page is sent with."""
    return {
        "content-security-policy": _policy(),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


def _hashes(tag: str) -> str:
    """The sources of a policy that allow the page's own `tag` elements."""
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page(), re.S)
    assert bodies, f"a {tag} of its own"
    digests = (hashlib.sha256(body.encode()).digest() for body in bodies)
    return " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in digests)
