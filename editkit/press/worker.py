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
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
from filelock import FileLock, Timeout
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from ..base.errors import UnavailableError
from .kernel import COMMAND

OOM_CODES = (137, 138)
OK, FAILED, DIED, NO_START, UNAVAILABLE = "ok", "failed", "died", "no-start", "unavailable"


class Processes:
    """The worker processes alive now, so that an interrupt can end them all."""

    def __init__(self) -> None:
        self._alive: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._closed = False

    def wait(self, command: list[str], **options) -> int:
        """Start a process that takes no part in our Ctrl-C and wait for its end; returns its exit code.

        Its standard input is a pipe that nobody but us holds open, so that it notices when we are gone.
        """
        with self._lock:
            if self._closed:
                return -signal.SIGTERM
            process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.PIPE, **options)
            self._alive.add(process)
        try:
            return process.wait()
        finally:
            process.stdin.close()
            with self._lock:
                self._alive.discard(process)

    def end_all(self) -> None:
        """Kill every process with its children (the kernels), and start no new ones."""
        with self._lock:
            self._closed = True
            for process in self._alive:
                with contextlib.suppress(psutil.Error):
                    for child in psutil.Process(process.pid).children(recursive=True):
                        child.kill()
                process.kill()


def call_worker(stage: Path, log: Path, env: dict[str, str], processes: Processes) -> tuple[dict, int]:
    """Run the worker process to its end; returns its outcome and exit code."""
    answer = stage / "outcome.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "editkit.press.worker", str(stage / "request.json")]
    with runtime_dir() as runtime, log.open("ab") as sink:
        env = env | {"JUPYTER_RUNTIME_DIR": str(runtime)}
        code = processes.wait(command, env=env, stdout=sink, stderr=sink)
    if answer.is_file():
        return json.loads(answer.read_text(encoding="utf-8")), code
    return {"status": DIED if code in (-signal.SIGKILL, *OOM_CODES) else FAILED, "message": ""}, code


@contextlib.contextmanager
def runtime_dir() -> Iterator[Path]:
    """A folder with a short path for the sockets of the kernel, whose names may not exceed about 100 characters.

    Each is held by a lock as long as its owner lives, so that what a killed one left can be told from what is in use.
    """
    for old in Path(tempfile.gettempdir()).glob("ek-*/lock"):
        with contextlib.suppress(OSError, Timeout), FileLock(old, timeout=0):
            shutil.rmtree(old.parent, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=".ek-"))
    with FileLock(made / "lock"):
        made = made.rename(made.with_name(made.name[1:]))  # it is seen by others only now, when it is locked
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)


# -------------------------------------------------------------------- in the worker


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
