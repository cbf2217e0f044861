"""Judge whether bytes are those that a store holds, by what the store says of them.

Best is the SHA-256 that we store with each object. Else the ETag: the MD5 of an object
written in one piece; of one written in N parts, the MD5 of the parts' MD5s, then `-N`
(the size of a part is not stated, so the usual ones are tried). A bucket encrypted with
KMS has ETags that are no digests at all (AWS, "Checking object integrity"): there two
equal downloads stand for a checksum.
"""

from __future__ import annotations

import hashlib
import logging
import re
from io import BufferedIOBase

# Part sizes of obstore (5), the AWS command line and boto3 (8), ourselves (16), and
# those that s3fs, rclone, MinIO and people choose: MiB.
_USUAL_PARTS_MIB = (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512)
_BLOCK_BYTES = 2**20

_log = logging.getLogger(__name__)

# Buckets whose ETags proved to be digests, or not to be, in this process.
_clear: set[str] = set()
_opaque: set[str] = set()


def sha256_of(file: BufferedIOBase) -> str:
    """Return the SHA-256 of a whole file, in hex."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def is_opaque(bucket: str) -> bool:
    """Whether the ETags of `scheme://bucket` have proved to be no digests."""
    return bucket in _opaque


def make_opaque(bucket: str) -> bool:
    """Take the ETags of `scheme://bucket` for no digests, unless one has matched."""
    if bucket in _clear:
        return False
    if bucket not in _opaque:
        _opaque.add(bucket)
        _log.warning(
            "the ETags of %s are no checksums (an encrypted bucket?); what others "
            "wrote there is checked by its size alone",
            bucket,
        )
    return True


def make_clear(bucket: str) -> None:
    """Note that an ETag of `scheme://bucket` was the digest of its object."""
    _clear.add(bucket)


def matches_etag(
    file: BufferedIOBase, etag: str | None, part_bytes: int | None = None
) -> bool | None:
    """Whether a file has this ETag; None where that cannot be told.

    Args:
        file: read from its start.
        etag: as the store gave it.
        part_bytes: the size of the parts in which it was written, where it is known.
    """
    found = re.fullmatch(r'"?([0-9a-f]{32})(?:-(\d+))?"?', etag or "")
    if found is None:
        return None
    digest, count = found.groups()
    if count is None:
        file.seek(0)
        return hashlib.file_digest(file, _md5).hexdigest() == digest
    size = file.seek(0, 2)
    sizes = [part_bytes] if part_bytes else [mib * 2**20 for mib in _USUAL_PARTS_MIB]
    likely = [each for each in sizes if -(-size // each) == int(count)]
    if any(_md5_of_parts(file, each) == digest for each in likely):
        return True
    return False if part_bytes else None


def _md5_of_parts(file: BufferedIOBase, part_bytes: int) -> str:
    whole = _md5()
    file.seek(0)
    left = part_bytes
    part = _md5()
    while block := file.read(min(_BLOCK_BYTES, left)):
        part.update(block)
        left -= len(block)
        if not left:
            whole.update(part.digest())
            part, left = _md5(), part_bytes
    if left != part_bytes:
        whole.update(part.digest())
    return whole.hexdigest()


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)
