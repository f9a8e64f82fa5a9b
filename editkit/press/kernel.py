"""The kernel of a run: ipykernel of this very interpreter, which remembers what the notebook reads.

A run depends on what it has read: modules, files of the package, corpora, weights. Nobody has to declare them: Python
says which files it opens (an audit hook), and `sys.modules` which modules were imported.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from importlib import metadata
from typing import Any

COMMAND = "from editkit.press.kernel import main; main()"
_COLLECTION = gc.get_threshold()
_STDLIB = os.path.dirname(os.__file__) + os.sep
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
    # Imports make half a million objects that stay; looking for garbage among them takes a fifth of their time, and a
    # tenth of a second at every later full collection.
    gc.set_threshold(200_000, 50, 1000)
    app.shell.events.register("post_run_cell", _settle)
    app.start()


def _settle(result: Any) -> None:
    """After the parameters, those injected, and two cells of imports: collect as usual, but not among what is there."""
    if result.execution_count is not None and result.execution_count >= 4:
        gc.freeze()
        gc.set_threshold(*_COLLECTION)
        from IPython import get_ipython

        get_ipython().events.unregister("post_run_cell", _settle)


def end_with_parent() -> None:
    """On Linux, have the system kill this process when its parent ends; elsewhere ipykernel looks every second."""
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
    modules, tops = {}, set()
    for name, module in list(sys.modules.items()):
        top, file = name.split(".")[0], getattr(module, "__file__", None)
        if top == "editkit" or (top not in _there and not _installed(file or "")):
            modules[name] = file
        else:
            tops.add(top)
    owners = metadata.packages_distributions()
    names = sorted({name for top in tops - _there for name in owners.get(top, ()) if name != "editkit"})
    return {
        "opened": sorted(path for path in _opened if not _installed(path)),
        "modules": {name: file for name, file in modules.items() if file and file.endswith(".py")},
        "packages": {name: metadata.version(name) for name in names},
    }


def _installed(path: str) -> bool:
    """Whether a file belongs to Python or to an installed package other than this one."""
    inside = {"site-packages", "dist-packages"} & set(path.split(os.sep))
    return not path or bool(inside and f"{os.sep}editkit{os.sep}" not in path) or path.startswith(_STDLIB)
