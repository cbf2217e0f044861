"""Objects behave as files, and faults on the way to them do not show."""

from __future__ import annotations

import random
import time

import pytest
from object_store import TROUBLE

from llmos_jax import stores
from llmos_jax.errors import StoreError

pytest_plugins = ["object_store"]

BIG = random.Random(0).randbytes(40 * 2**20)
"""Three parts and three ranges."""

NAMES = [f"shards/part-{index:02}.bin" for index in range(24)]


def test_what_is_written_is_read(object_store):
    url = f"{object_store.url}/a/b c.txt"
    stores.write_bytes(url, b"one")
    stores.write_bytes(url, b"two")
    assert stores.read_bytes(url) == b"two"
    stores.write_bytes(f"{object_store.url}/empty", b"")
    assert stores.read_bytes(f"{object_store.url}/empty") == b""


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["a.txt", "d/b.txt", "d/c.csv", "d/e/f.txt"]),
        ("d", ["d/b.txt", "d/c.csv", "d/e/f.txt"]),
        ("d/", ["d/b.txt", "d/c.csv", "d/e/f.txt"]),
        ("a.txt", ["a.txt"]),
        ("*.txt", ["a.txt"]),
        ("d/*", ["d/b.txt", "d/c.csv"]),
        ("**/*.txt", ["a.txt", "d/b.txt", "d/e/f.txt"]),
        ("d/[!b]*", ["d/c.csv"]),
        ("d/?.txt", ["d/b.txt"]),
    ],
)
def test_list_files_takes_an_object_a_folder_and_a_glob(object_store, pattern, names):
    for name in ("a.txt", "d/b.txt", "d/c.csv", "d/e/f.txt"):
        stores.write_bytes(f"{object_store.url}/{name}", b"x")
    found = stores.list_files(f"{object_store.url}/{pattern}")
    assert [one.url for one in found] == [f"{object_store.url}/{n}" for n in names]


def test_names_and_deletion_of_a_folder(object_store):
    for name in ("d/b", "d/e/f", "dd"):
        stores.write_bytes(f"{object_store.url}/{name}", b"x")
    assert stores.list_names(object_store.url) == ["d/", "dd"]
    assert stores.list_names(f"{object_store.url}/d") == ["b", "e/"]
    assert stores.delete(f"{object_store.url}/d") == 2
    assert object_store.keys() == ["dd"]
    assert not stores.exists(f"{object_store.url}/d")
    assert stores.exists(f"{object_store.url}/dd")


def test_folders_travel_both_ways_and_only_once(object_store, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a").write_bytes(b"a")
    (source / "deep" / "big").write_bytes(BIG)
    url = f"{object_store.url}/copy"
    assert stores.upload_folder(source, url) == 1 + len(BIG)
    target = tmp_path / "target"
    assert stores.download_folder(url, target) == 1 + len(BIG)
    assert (target / "deep" / "big").read_bytes() == BIG
    assert stores.download_folder(url, target) == 0
    (target / "a").write_bytes(b"b")
    assert stores.download_folder(url, target) == 1
    assert (target / "a").read_bytes() == b"a"


@pytest.fixture
def google_store(object_store, monkeypatch):
    """The same server as Google's XML interface, which speaks as S3 does."""
    for name in object_store.environment():
        monkeypatch.delenv(name)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", object_store.endpoint)
    return f"gs://{object_store.bucket}"


def test_google_storage_is_spoken_to_alike(object_store, google_store, tmp_path):
    big = tmp_path / "big"
    big.write_bytes(BIG)
    object_store.faults = TROUBLE
    for name in ("d/a b.txt", "d/e/c"):
        stores.write_bytes(f"{google_store}/{name}", name.encode())
    assert stores.read_bytes(f"{google_store}/d/a b.txt") == b"d/a b.txt"
    found = [one.url for one in stores.list_files(f"{google_store}/d/*")]
    assert found == [f"{google_store}/d/a b.txt"]
    stores.upload(big, f"{google_store}/big")
    assert stores.local_copy(f"{google_store}/big").read_bytes() == BIG
    assert stores.delete(f"{google_store}/d") == 2
    with pytest.raises(StoreError, match="there is no bucket gs://no-such"):
        stores.read_bytes("gs://no-such/x")


def test_no_credentials_are_named(object_store, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("LLMOS_STORE_PATIENCE_S", "2")
    with pytest.raises(StoreError, match="no credentials for s3://.*AWS_ACCESS_KEY_ID"):
        stores.list_files(f"{object_store.url}/x")


def test_a_profile_has_credentials(object_store, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    file.write_text("[mine]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    stores.write_bytes(f"{object_store.url}/x", b"x")
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(StoreError, match="no such profile. It has: mine"):
        stores.write_bytes(f"{object_store.url}/x", b"x")


def test_plain_http_beyond_this_machine_must_be_asked_for(object_store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage.example:9000")
    with pytest.raises(StoreError, match="plain http.*AWS_ALLOW_HTTP=true"):
        stores.list_files(f"{object_store.url}/x")


def test_everything_succeeds_while_thirty_percent_fail(object_store, tmp_path):
    big = tmp_path / "big"
    big.write_bytes(BIG)
    object_store.faults = TROUBLE
    for name in NAMES:
        stores.write_bytes(f"{object_store.url}/{name}", name.encode())
    stores.upload(big, f"{object_store.url}/big")
    found = stores.list_files(f"{object_store.url}/shards/*.bin")
    assert [one.url.removeprefix(f"{object_store.url}/") for one in found] == NAMES
    for one in found:
        assert stores.local_copy(one).read_bytes() == one.url[-len(NAMES[0]) :].encode()
    assert stores.local_copy(f"{object_store.url}/big").read_bytes() == BIG
    assert stores.delete(f"{object_store.url}/shards") == len(NAMES)
    assert object_store.keys() == ["big"]
    assert sum(object_store.injected.values()) > 10


@pytest.mark.parametrize("kind", list(TROUBLE))
def test_each_fault_alone_is_survived(object_store, kind):
    object_store.faults = {kind: 0.5}
    url = f"{object_store.url}/one"
    for index in range(5):
        stores.write_bytes(url, BIG[: 1000 + index])
        assert stores.read_bytes(url) == BIG[: 1000 + index]
    assert object_store.injected[kind] > 3


@pytest.mark.parametrize("kind", ["lost", "cut"])
def test_an_upload_whose_last_answer_is_lost_is_there(object_store, tmp_path, kind):
    path = tmp_path / "big"
    path.write_bytes(BIG[: 17 * 2**20])
    object_store.faults, object_store.only = {kind: 0.7}, "uploadId="
    for index in range(3):
        stores.upload(path, f"{object_store.url}/{index}")
        assert stores.local_copy(f"{object_store.url}/{index}").read_bytes() == (
            path.read_bytes()
        )
    assert object_store.injected[kind] > 1


def test_slow_answers_are_waited_for(object_store):
    object_store.faults = {"delay": 1.0}
    stores.write_bytes(f"{object_store.url}/slow", b"slow")
    assert stores.read_bytes(f"{object_store.url}/slow") == b"slow"


def test_a_refusal_is_final_at_once(object_store):
    object_store.faults = {"denied": 1.0}
    with pytest.raises(StoreError, match=r"denied .*AccessDenied.*Check the keys"):
        stores.write_bytes(f"{object_store.url}/x", b"x")
    assert len(object_store.requests) == 1


def test_a_missing_object_is_final_at_once(object_store):
    with pytest.raises(StoreError, match="there is no object s3://.*/nothing"):
        stores.read_bytes(f"{object_store.url}/nothing")
    with pytest.raises(StoreError, match="nothing is at s3://"):
        stores.list_files(f"{object_store.url}/nothing/*")
    assert len(object_store.requests) <= 4


@pytest.mark.parametrize(
    "act",
    [
        stores.read_bytes,
        stores.exists,
        stores.list_files,
        stores.list_names,
        stores.delete,
        stores.local_copy,
        lambda url: stores.write_bytes(url, b"x"),
    ],
)
def test_a_missing_bucket_is_named(object_store, act):
    with pytest.raises(StoreError, match="there is no bucket s3://no-such-bucket at"):
        act("s3://no-such-bucket/key")
    assert len(object_store.requests) <= 3


def test_a_dead_endpoint_fails_in_bounded_time(object_store, monkeypatch):
    object_store.close()
    monkeypatch.setenv("LLMOS_STORE_PATIENCE_S", "2")
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"no right answer in \d s .*refused"):
        stores.list_files(f"{object_store.url}/x")
    assert time.monotonic() - began < 8


def test_endless_trouble_fails_in_bounded_time(object_store, monkeypatch):
    object_store.faults = {"slow_down": 1.0}
    monkeypatch.setenv("LLMOS_STORE_PATIENCE_S", "2")
    began = time.monotonic()
    with pytest.raises(StoreError, match="503 SlowDown: Please reduce"):
        stores.write_bytes(f"{object_store.url}/x", b"x")
    assert time.monotonic() - began < 8


def test_a_bit_flipped_on_the_way_out_is_written_again(object_store):
    object_store.faults = {"spoil": 0.5}
    object_store.only = "PUT"
    for index in range(8):
        url = f"{object_store.url}/{index}"
        stores.write_bytes(url, BIG[:5000])
        object_store.faults, kept = {}, object_store.faults
        assert stores.read_bytes(url) == BIG[:5000]
        object_store.faults = kept
    assert object_store.injected["spoil"] > 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("LLMOS_STORE_PATIENCE_S", "soon"), ("LLMOS_CACHE_GIB", "-1")],
)
def test_malformed_settings_are_errors(object_store, monkeypatch, name, value):
    stores.write_bytes(f"{object_store.url}/x", b"x")
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=f"{name} is '{value}'"):
        stores.local_copy(f"{object_store.url}/x")
