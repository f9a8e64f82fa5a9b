"""Fingerprints of files and code: what a source says, not how it is laid out or when it was written."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ABSENT = "absent"
_HOLDERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def digest(*parts: str | bytes) -> str:
    """sha256 over the parts, each preceded by its length, so that no two lists of parts coincide."""
    h = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        h.update(f"{len(raw)}:".encode())
        h.update(raw)
    return h.hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, remembered while its size and modification time stay the same; "absent" without it."""
    if path.is_symlink() and path.resolve().parent.name == "blobs":  # the model hub's cache: named by content
        return path.resolve().name
    try:
        stat = path.stat()
    except OSError:
        return ABSENT
    return _file_hash(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=8192)
def _file_hash(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def files_below(folder: Path) -> list[Path]:
    """All files of a folder but compiled ones, sorted."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def tree_hash(path: Path) -> str:
    """Hash of a file, or of all files below a folder with relative names; "absent" if there is nothing."""
    if path.is_file():
        return file_hash(path)
    files = files_below(path)
    if not files:
        return ABSENT
    return digest(*(part for p in files for part in (p.relative_to(path).as_posix(), file_hash(p))))


def code_hash(text: str) -> str:
    """Hash of Python code: comments, layout and docstrings (unless `__doc__` is read) do not count.

    Text that is not plain Python, such as a cell with a shell line, counts as it is.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return digest(text)
    if "__doc__" not in text:
        for node in ast.walk(tree):
            if isinstance(node, _HOLDERS) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
    return digest(ast.dump(tree))


def source_hash(path: Path) -> str:
    """`code_hash` of a file, "absent" if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return ABSENT
    return _source_hash(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2048)
def _source_hash(path: str, size: int, mtime_ns: int) -> str:
    return code_hash(Path(path).read_text(encoding="utf-8", errors="replace"))


def closure_hash(*files: str | Path) -> str:
    """Hash of modules of this package together with every module of it that they import, directly or not."""
    found: set[Path] = set()
    queue = [Path(file).resolve() for file in files]
    while queue:
        path = queue.pop()
        if path not in found:
            found.add(path)
            queue += _imports(path)
    return digest(*(f"{p.relative_to(PACKAGE.parent)} {source_hash(p)}" for p in sorted(found)))


@functools.lru_cache(maxsize=2048)
def _imports(path: Path) -> tuple[Path, ...]:
    """Files of this package that a module imports anywhere in its code, type checking apart."""
    here = path.parent.relative_to(PACKAGE.parent).parts
    names: list[tuple[str, ...]] = []
    queue: list[ast.AST] = [ast.parse(path.read_bytes())]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            queue += node.orelse
            continue
        queue += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names += [base, *((*base, alias.name) for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [tuple(alias.name.split(".")) for alias in node.names]
    places = [
        PACKAGE.parent.joinpath(*name)
        for name in names
        if name[:1] == (PACKAGE.name,) and name != (PACKAGE.name,)
    ]
    return tuple(f for p in places for f in (p.with_suffix(".py"), p / "__init__.py") if f.is_file())


def environment_names(text: str) -> set[str]:
    """Names of environment variables that code reads by a literal name."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return set()
    found = []
    for node in nodes:
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            found.append(node.slice)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("environ.get", "getenv")):
            found += node.args[:1]
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith("environ"):
            found.append(node.left)
    return {node.value for node in found if isinstance(node, ast.Constant) and isinstance(node.value, str)}
