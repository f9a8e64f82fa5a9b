"""Paths as users have them, and files that are written whole or not at all.

A path may be a text or any os.PathLike, begin with `~`, hold spaces, and be a link: reading and writing go to the file
that a link names, as with every program. Folders of a file to be written are made.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import DataError


def user_path(path: str | os.PathLike) -> Path:
    """The path with `~` in place of the home folder filled in."""
    return Path(os.path.expanduser(os.fsdecode(path)))


def file_to_read(path: str | os.PathLike, what: str = "the file") -> Path:
    """The path of a file that is there; raises DataError naming it otherwise."""
    found = user_path(path)
    if found.is_dir():
        raise DataError(f"cannot read {what} {path}: it is a folder; give the path of the file")
    if not found.exists():
        raise DataError(f"cannot read {what} {path}: there is no such file; check the path")
    return found


def file_to_write(path: str | os.PathLike) -> Path:
    """The path behind all links, its folder made if need be. Raises DataError for a folder, or below a file."""
    text = os.fsdecode(path)
    found = Path(os.path.realpath(user_path(path)))
    if found.is_dir() or text.endswith(os.sep):
        raise DataError(f"cannot write {path}: it is a folder; add the name of a file")
    to_folder(found.parent)
    return found


def to_folder(path: str | os.PathLike) -> Path:
    """The folder, made if need be. Raises DataError if a file is in its way."""
    folder = user_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{path} cannot be a folder: {error.filename or path} is a file; choose another") from error
    return folder


@contextmanager
def written(path: str | os.PathLike) -> Iterator[Path]:
    """`with written(path) as part:` gives an empty file to fill; it becomes `path` if the block ends well.

    Whoever reads the path finds the old file or the whole new one. It has the permissions of the file it replaces,
    or those that a new file has. Raises DataError as `file_to_write` does.
    """
    target = file_to_write(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        if target.exists():
            mode = target.stat().st_mode & 0o7777
        else:
            mask = os.umask(0)
            os.umask(mask)
            mode = 0o666 & ~mask
        part.chmod(mode)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
