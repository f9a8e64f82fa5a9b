"""Where downloaded files are kept, and how they are told apart."""

from __future__ import annotations

import hashlib
import lzma
import os
from pathlib import Path

from .paths import user_path

DOWNLOADS_ENV = "EDITKIT_DOWNLOADS"


def download_dir(kind: str = "corpora") -> Path:
    """Folder of downloaded files: EDITKIT_DOWNLOADS, else the user's cache folder.

    kind: "corpora" (directly below EDITKIT_DOWNLOADS) or another word, a folder of its own.
    """
    if os.environ.get(DOWNLOADS_ENV):
        given = user_path(os.environ[DOWNLOADS_ENV])
        return given if kind == "corpora" else given / kind
    import pooch

    return Path(pooch.os_cache("editkit")) / kind


def sha256_of(path: Path) -> str:
    """sha256 of a file, of its content where it is compressed (.xz); read in blocks."""
    with lzma.open(path) if path.suffix == ".xz" else open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
