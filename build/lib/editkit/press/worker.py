"""The process that executes one run: papermill in here, the kernel in a child of its own.

Called as `python -m editkit.press.worker REQUEST.json`; writes `outcome.json` beside the request. A run in its
own process cannot take the others down, and a kernel of exactly this interpreter is used whatever kernelspecs
are registered on the machine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from ..base.errors import UnavailableError
from .kernel import COMMAND

OOM_CODES = (137, 138)
OK, FAILED, DIED, NO_START, UNAVAILABLE = "ok", "failed", "died", "no-start", "unavailable"


class OwnKernelManager(AsyncKernelManager):
    """Starts ipykernel with this very interpreter, over sockets in the file system where there are any."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if os.name == "posix":  # no TCP ports: nothing to race for, nothing to listen in on
            self.transport = "ipc"
            self.connection_file = os.path.join(os.environ["JUPYTER_RUNTIME_DIR"], "kernel.json")

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-c", COMMAND, "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def _end_with_runner() -> None:
    """End this process and its kernel, and clear up, when the process that started it is gone.

    Our standard input is a pipe whose other end only the runner holds: however it ends, reading ends.
    """

    def watch() -> None:
        os.read(0, 1)
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        shutil.rmtree(os.environ["JUPYTER_RUNTIME_DIR"], ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def execute(request: dict) -> dict:
    """Run the notebook of the request; returns the outcome {status, message, cell}."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    output = Path(request["output"])
    with open(request["log"], "a", encoding="utf-8") as log:
        try:
            papermill.execute_notebook(
                nbformat.read(request["notebook"], as_version=4),
                str(output),
                parameters=request["parameters"],
                kernel_name="python3",
                language="python",
                cwd=request["cwd"],
                progress_bar=False,
                start_timeout=request.get("start_timeout", 120),
                stdout_file=log,
                stderr_file=log,
                kernel_manager_class=OwnKernelManager,
            )
        except PapermillExecutionError as error:
            log.write("\n".join(error.traceback) + "\n")
            if error.ename == UnavailableError.__name__:
                return {"status": UNAVAILABLE, "message": error.evalue}
            return {"status": FAILED, "message": f"{error.ename}: {error.evalue}", "cell": error.cell_index}
        except DeadKernelError as error:
            return {"status": DIED, "message": str(error)}
        except RuntimeError as error:
            if "Kernel did" in str(error):  # "didn't respond in ...", "died before replying to kernel_info"
                return {"status": NO_START, "message": str(error)}
            raise
    return {"status": OK, "message": ""}


def main(request_path: str) -> int:
    """Entry point of the process; the exit code is 0 whenever an outcome was written."""
    _end_with_runner()
    logging.getLogger("papermill").setLevel(logging.WARNING)
    path = Path(request_path)
    request = json.loads(path.read_text(encoding="utf-8"))
    begin = time.time()
    outcome = execute(request)
    outcome |= {"started": begin, "seconds": time.time() - begin}
    partial = path.with_name(".outcome.partial")
    partial.write_text(json.dumps(outcome), encoding="utf-8")
    partial.replace(path.with_name("outcome.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
