"""The kernel of a run: ipykernel of this very interpreter, which remembers what the notebook reads.

A run depends on what it has read: modules, files of the package, corpora, weights. Nobody has to declare them: Python
says which files it opens (an audit hook), and `sys.modules` which modules were imported.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import metadata
from typing import Any

COMMAND = "from editkit.press.kernel import main; main()"
_opened: set[str] = set()
_there: set[str] = set()  # top-level modules of the kernel itself


def main() -> None:
    """Entry point: serve until told to stop, or until the process that asked for the kernel is gone."""
    end_with_parent()
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance()
    app.initialize(sys.argv[1:])
    _there.update(name.split(".")[0] for name in sys.modules if not name.startswith("editkit"))
    sys.addaudithook(_note)
    app.start()


def end_with_parent() -> None:
    """Where the system can (Linux), have it kill this process when its parent ends; ipykernel itself looks every second."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _note(event: str, args: tuple) -> None:
    if event == "open" and isinstance(args[0], (str, bytes)) and not (args[2] or 0) & os.O_WRONLY:
        path = os.path.abspath(os.fsdecode(args[0]))
        if not path.endswith((".py", ".pyc")):
            _opened.add(path)


def what_was_read() -> dict[str, Any]:
    """{"opened": paths, "modules": {name: file} outside of installed packages, "packages": {distribution: version}}.

    Packages are those imported since the notebook began; the kernel's own do not decide a number.
    """
    installed = tuple(os.path.join(prefix, "") for prefix in {sys.prefix, sys.base_prefix, sys.exec_prefix})
    modules, tops = {}, set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or not file.endswith(".py") or name == "__main__":
            tops.add(name.split(".")[0])
        elif name.split(".")[0] == "editkit" or not file.startswith(installed):
            modules[name] = file
        else:
            tops.add(name.split(".")[0])
    owners = metadata.packages_distributions()
    names = sorted({name for top in tops - _there for name in owners.get(top, ()) if name != "editkit"})
    return {
        "opened": sorted(path for path in _opened if not path.startswith(installed)),
        "modules": modules,
        "packages": {name: metadata.version(name) for name in names},
    }
