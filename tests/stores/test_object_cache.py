"""Local copies: right or fetched again, shared, bounded, safe from kill -9."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from llmos_jax import stores
from llmos_jax.errors import StoreError
from llmos_jax.stores import digests

BIG = random.Random(1).randbytes(40 * 2**20)
PATIENCE_S = 60

FETCH = """
import sys
from llmos_jax import stores

pytest_plugins = ["object_store"]
path = stores.local_copy(sys.argv[1])
print(path, flush=True)
if sys.argv[2:]:
    sys.stdin.read()
"""


def start(url, *more):
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, url, *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )


def gets(object_store, name):
    return [
        one for one in object_store.requests if one.startswith("GET") and name in one
    ]


def test_a_copy_is_fetched_once_and_has_the_name_of_its_object(object_store):
    url = f"{object_store.url}/d/text.jsonl"
    stores.write_bytes(url, b"{}")
    first = stores.local_copy(url)
    assert first.name == "text.jsonl"
    assert first.read_bytes() == b"{}"
    assert stores.local_copy(stores.list_files(url)[0]) == first
    assert len(gets(object_store, "text.jsonl")) == 1


def test_an_object_that_is_written_anew_has_a_new_copy(object_store):
    url = f"{object_store.url}/x"
    stores.write_bytes(url, b"old")
    old = stores.local_copy(url)
    stores.write_bytes(url, b"new")
    assert stores.local_copy(url).read_bytes() == b"new"
    assert old.read_bytes() == b"old"


def test_an_object_written_anew_since_it_was_listed_is_refused(object_store):
    url = f"{object_store.url}/x"
    stores.write_bytes(url, b"old")
    [listed] = stores.list_files(url)
    stores.write_bytes(url, b"new")
    with pytest.raises(StoreError, match="written anew while it was read"):
        stores.local_copy(listed)


def test_a_flipped_bit_is_found_and_fetched_again(object_store):
    url = f"{object_store.url}/x"
    stores.write_bytes(url, BIG[:100_000])
    object_store.faults, object_store.only = {"flip": 0.5}, "GET"
    for _ in range(6):
        assert stores.read_bytes(url) == BIG[:100_000]
    assert object_store.injected["flip"] > 1


def test_a_flipped_bit_is_found_by_the_etag_of_anothers_object(object_store, moto):
    name = f"http://127.0.0.1:{moto}/{object_store.bucket}/foreign"
    put_plainly(name, BIG[:100_000])
    object_store.faults, object_store.only = {"flip": 0.5}, "GET"
    for _ in range(6):
        url = f"{object_store.url}/foreign"
        assert stores.read_bytes(url) == BIG[:100_000]
    assert object_store.injected["flip"] > 1


def put_plainly(name, data):
    request = urllib.request.Request(name, data, method="PUT")
    request.add_header("Content-Type", "application/octet-stream")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def test_an_object_that_stays_damaged_is_an_error(object_store):
    url = f"{object_store.url}/x"
    stores.write_bytes(url, b"precious")
    object_store.faults, object_store.only = {"flip": 1.0}, "GET"
    with pytest.raises(StoreError, match="is damaged: 5 downloads .* checksum"):
        stores.local_copy(url)


def test_an_object_without_any_checksum_is_read_all_the_same(object_store, moto):
    put_plainly(f"http://127.0.0.1:{moto}/{object_store.bucket}/x", b"sealed")
    [listed] = stores.list_files(f"{object_store.url}/x")
    remote = type(listed)(url=listed.url, size=6, etag=None, modified=listed.modified)
    assert stores.local_copy(remote).read_bytes() == b"sealed"


def test_etags_that_are_no_checksums_are_found_out(object_store, moto, caplog):
    """As those of a bucket under KMS."""
    put_plainly(f"http://127.0.0.1:{moto}/{object_store.bucket}/x", b"sealed")
    [listed] = stores.list_files(f"{object_store.url}/x")
    object_store.etags = {listed.etag: f'"{"0" * 32}"'}
    assert stores.read_bytes(listed.url) == b"sealed"
    assert len(gets(object_store, "/x")) == 2
    assert "are no checksums" in caplog.text
    assert stores.read_bytes(listed.url) == b"sealed"
    assert len(gets(object_store, "/x")) == 3


def test_one_right_etag_makes_a_wrong_one_conclusive(object_store, moto):
    for name in ("good", "rotten"):
        put_plainly(
            f"http://127.0.0.1:{moto}/{object_store.bucket}/{name}", name.encode()
        )
    assert stores.read_bytes(f"{object_store.url}/good") == b"good"
    [listed] = stores.list_files(f"{object_store.url}/rotten")
    object_store.etags = {listed.etag: f'"{"0" * 32}"'}
    with pytest.raises(StoreError, match="is damaged: 5 downloads"):
        stores.read_bytes(listed.url)


@pytest.mark.parametrize("part_mib", [5, 8, 16])
def test_the_etag_of_parts_is_understood(tmp_path, part_mib):
    path = tmp_path / "file"
    path.write_bytes(BIG)
    size = part_mib * 2**20
    parts = [BIG[at : at + size] for at in range(0, len(BIG), size)]
    whole = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts))
    etag = f'"{whole.hexdigest()}-{len(parts)}"'
    with path.open("rb") as file:
        assert digests.matches_etag(file, etag) is True
        assert digests.matches_etag(file, etag, size) is True
        assert digests.matches_etag(file, f'"{"0" * 32}-{len(parts)}"', size) is False
        assert digests.matches_etag(file, f'"{"0" * 32}-{len(parts)}"') is None
        assert digests.matches_etag(file, '"0x8D"') is None


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_copy_damaged_on_disk_is_fetched_again(object_store, how):
    url = f"{object_store.url}/x"
    stores.write_bytes(url, b"precious")
    with start(url) as process:
        path = stores.local_copy(url).parent / process.communicate()[0].strip()
    path.chmod(0o644)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"preciouS" if how == "flipped" else b"prec")
    assert stores.local_copy(url).read_bytes() == b"precious"


def test_two_processes_fetch_one_object_once(object_store):
    url = f"{object_store.url}/big"
    stores.write_bytes(url, BIG)
    object_store.requests.clear()
    object_store.faults, object_store.delay_s = {"delay": 1.0}, 0.5
    both = [start(url), start(url)]
    paths = {process.communicate(timeout=PATIENCE_S)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1
    assert len(gets(object_store, "/big")) == 3
    assert stores.local_copy(url).read_bytes() == BIG


def test_killed_during_a_download_leaves_no_wrong_file(object_store, tmp_path):
    url = f"{object_store.url}/big"
    stores.write_bytes(url, BIG)
    object_store.faults, object_store.only = {"delay": 1.0}, "GET"
    object_store.delay_s = 3.0
    process = start(url)
    deadline = time.monotonic() + PATIENCE_S
    while not gets(object_store, "/big"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    cache = tmp_path / "llmos-cache" / "objects"
    assert not list(cache.glob("*/facts.json"))
    object_store.faults = {}
    assert stores.local_copy(url).read_bytes() == BIG
    assert not list(cache.glob("*.tmp"))


def put_many(object_store, count):
    urls = [f"{object_store.url}/part-{index}" for index in range(count)]
    for index, url in enumerate(urls):
        stores.write_bytes(url, bytes([index]) * 1_000_000)
    return urls


def test_what_was_used_longest_ago_is_evicted(object_store, monkeypatch):
    monkeypatch.setenv("LLMOS_CACHE_GIB", str(3.5e6 / 2**30))
    urls = put_many(object_store, 4)
    paths = []
    for url in urls[:3]:
        paths.append(stores.local_copy(url))
        stores.release(paths[-1])
    stores.release(stores.local_copy(urls[0]))
    assert all(path.exists() for path in paths)
    stores.local_copy(urls[3])
    assert [path.exists() for path in paths] == [True, False, True]


def test_what_is_in_use_is_never_evicted(object_store, monkeypatch):
    monkeypatch.setenv("LLMOS_CACHE_GIB", str(1.5e6 / 2**30))
    urls = put_many(object_store, 3)
    other = start(urls[0], "stay")
    theirs = other.stdout.readline().strip()
    mine = stores.local_copy(urls[1])
    stores.local_copy(urls[2])
    assert mine.exists()
    assert os.path.exists(theirs)
    other.kill()
    other.communicate()
    stores.write_bytes(f"{object_store.url}/more", b"x")
    stores.local_copy(f"{object_store.url}/more")
    assert mine.exists()
    assert not os.path.exists(theirs)


def test_a_forked_process_is_told_instead_of_hanging(object_store):
    stores.write_bytes(f"{object_store.url}/x", b"x")
    code = FORKED.format(url=f"{object_store.url}/x")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert "a forked process cannot use" in done.stdout


FORKED = """
import os
from llmos_jax import errors, stores
stores.read_bytes("{url}")
child = os.fork()
if child:
    os.waitpid(child, 0)
else:
    try:
        stores.read_bytes("{url}")
    except errors.StoreError as problem:
        print(problem, flush=True)
    os._exit(0)
"""
