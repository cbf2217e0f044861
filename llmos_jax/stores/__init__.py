"""Read and write object stores (s3://, gs://) as if their objects were files."""

from llmos_jax.stores.address import Address, is_remote, join
from llmos_jax.stores.cache import local_copy, release
from llmos_jax.stores.fetch import Remote, fetch_to
from llmos_jax.stores.folders import download_folder, upload_folder
from llmos_jax.stores.objects import (
    delete,
    exists,
    list_files,
    list_names,
    read_bytes,
    upload,
    write_bytes,
)

__all__ = [
    "Address",
    "Remote",
    "delete",
    "download_folder",
    "exists",
    "fetch_to",
    "is_remote",
    "join",
    "list_files",
    "list_names",
    "local_copy",
    "read_bytes",
    "release",
    "upload",
    "upload_folder",
    "write_bytes",
]
