"""Where a run comes from: packages, hardware, git state."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

REPORTED_PACKAGES = (
    "numpy", "scipy", "torch", "transformers", "tokenizers", "pandas", "scikit-learn", "matplotlib",
    "safetensors", "papermill", "jupyter-book", "nltk",
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


def git_state(root: Path, commit: str | None = None, files: Sequence[str] | None = None) -> dict:
    """{"commit": hash or None, "dirty": bool or None}; dirty: the files differ from the commit.

    commit: to compare with, the present one if None.   files: below root; None: the code of the project.
    """

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = commit or git("rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None}
    if files is None:
        files = ["editkit", "notebooks", "studies", "constraints.txt"]
        unknown = git("ls-files", "--others", "--exclude-standard", "--", *files)
    else:  # code that is in no commit counts, ignored or not; data and models have their hash in the key
        unknown = git("ls-files", "--others", "--", *(f for f in files if f.endswith((".py", ".ipynb"))))
    changed = git("diff", "--name-only", commit, "--", *files)
    return {"commit": commit, "dirty": None if changed is None else bool(changed or unknown)}
