"""Where a run comes from: packages, hardware, git state, and hashes of everything that goes into it."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# A change of one of these may change numbers, so it counts as a changed input.
NUMERIC_PACKAGES = ("numpy", "scipy", "torch", "transformers", "tokenizers")
REPORTED_PACKAGES = (
    *NUMERIC_PACKAGES, "pandas", "scikit-learn", "matplotlib", "seaborn", "safetensors", "papermill",
    "jupyter-book", "nltk",
)  # fmt: skip


def package_versions(names=REPORTED_PACKAGES) -> dict[str, str]:
    """{distribution: version} of the installed ones among `names`, with python itself first."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict:
    """Processor, cores, memory, accelerators and threads of this machine, without naming the machine."""
    torch = sys.modules.get("torch")  # a run that did not use torch has no accelerator to report
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    count = torch.cuda.device_count() if torch else 0
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": memory,
        "accelerators": [torch.cuda.get_device_name(i) for i in range(count)],
        "torch_threads": torch.get_num_threads() if torch else None,
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory_mib() -> dict[str, float | None]:
    """Peak resident memory of this process, and of torch on the accelerator if one was used, in MiB."""
    peak = None
    try:
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    except ImportError:  # not on Windows
        pass
    torch = sys.modules.get("torch")
    used = None
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        used = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return {"host": None if peak is None else round(peak, 1), "accelerator": used}


def kernel_facts(started: float) -> dict:
    """What only the executing kernel knows: its packages, hardware, memory and editkit modules.

    started: `time.time()` when the kernel began to import editkit.
    """
    return {
        "packages": package_versions(),
        "hardware": hardware(),
        "peak_memory_mib": peak_memory_mib(),
        "modules": imported_sources(started),
    }


def git_state(root: Path) -> dict:
    """{"commit": hash or None, "dirty": bool or None}; dirty: the code differs from the commit."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", "editkit", "notebooks", "studies", "constraints.txt")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


# -------------------------------------------------------------------- hashes


def digest(*parts: str | bytes) -> str:
    """sha256 over the parts, each preceded by its length, so that no two lists of parts coincide."""
    h = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        h.update(f"{len(raw)}:".encode())
        h.update(raw)
    return h.hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, remembered while its size and modification time stay the same."""
    stat = path.stat()
    return _file_hash(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _file_hash(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def tree_hash(path: Path) -> str:
    """Hash of a file, or of all files below a folder with relative names; "absent" if there is nothing."""
    if path.is_file():
        return file_hash(path)
    files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    if not files:
        return "absent"
    return digest(*(part for p in files for part in (p.relative_to(path).as_posix(), file_hash(p))))


def source_hash(path: Path) -> str:
    """Hash of a Python file's syntax tree: comments and layout do not count, everything else does."""
    try:
        return digest(ast.dump(ast.parse(path.read_bytes())))
    except OSError:
        return "absent"
    except SyntaxError:
        return file_hash(path)


def imported_sources(started: float) -> dict[str, str]:
    """{path below the package: source hash} of every editkit module this process has imported.

    A file written after `started` may differ from what was imported; it gets a hash that matches nothing.
    """
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == PACKAGE.name and getattr(module, "__file__", None):
            path = Path(module.__file__).resolve()
            if path.is_relative_to(PACKAGE):
                fresh = path.stat().st_mtime > started
                found[path.relative_to(PACKAGE).as_posix()] = (
                    "edited during the run" if fresh else source_hash(path)
                )
    return dict(sorted(found.items()))


def sources_changed(recorded: dict[str, str], package: Path = PACKAGE) -> list[str]:
    """Those of the recorded module files whose source is different now.

    What a notebook imports is decided by its own code and by the modules it imports, so an unchanged recorded
    set means that a new execution would import the same code.
    """
    return [name for name, old in recorded.items() if source_hash(package / name) != old]
