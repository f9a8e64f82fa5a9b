"""Where the files of the corpora come from: registry, offline folder, checked download.

The CLaRE corpus lies in the package, compressed, with its licence (`packed/`). Other files are looked up in the folder
named by the environment variable EDITKIT_DATA, then in the download cache (EDITKIT_DOWNLOADS or the user's cache
folder), and are downloaded last. A file with a known sha256 is checked wherever it was found.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path

from ..base.downloads import download_dir, sha256_of
from ..base.errors import DataError, UnavailableError
from ..base.paths import user_path

log = logging.getLogger(__name__)

PACKED = Path(__file__).parent / "packed"
DATA_ENV = "EDITKIT_DATA"


@dataclasses.dataclass(frozen=True)
class Source:
    """One downloadable file.

    file:    path below EDITKIT_DATA and below the download cache.   url: None if there is no stable address.
    sha256:  None where no checked copy was at hand; then a download needs `allow_unverified`.
    seen:    {sha256: where} hashes of public copies, told to the user for comparison, never a proof.
    home:    page of the data set.   licence: as stated by the repository that hands it out.
    commit:  commit of that repository, None if the address is not pinned.   packed: name in `packed/`, if it is there.
    """

    file: str
    url: str | None
    home: str
    licence: str
    sha256: str | None = None
    commit: str | None = None
    seen: dict[str, str] = dataclasses.field(default_factory=dict)
    packed: str | None = None


_CLARE = "7695423d5421d8181eb3dafe4c6541e5eefefa37"
_RIPPLE = "21182d13b6ddaa50f023052d13ff59e279deec05"
_MEMIT = "https://memit.baulab.info/data/dsets/"
_MQUAKE = "https://raw.githubusercontent.com/princeton-nlp/MQuAKE/main/datasets/"
_GITHUB = "https://github.com/"


def _memit(folder: str, name: str, **more) -> Source:
    return Source(f"{folder}/{name}", _MEMIT + name, _GITHUB + "kmeng01/memit", "MIT (repository)", **more)


def _easyedit(folder: str, name: str) -> Source:
    return Source(f"{folder}/{name}", None, _GITHUB + "zjunlp/EasyEdit", "MIT (repository)")


def _mquake(name: str) -> Source:
    return Source(f"mquake/{name}", _MQUAKE + name, _GITHUB + "princeton-nlp/MQuAKE", "see the repository")


def _ripple(name: str, sha256: str | None = None) -> Source:
    home = _GITHUB + "edenbiran/RippleEdits"
    # the address that GitHub redirects to the content also for files kept in Git LFS
    url = f"{home}/raw/{_RIPPLE}/data/benchmark/{name}"
    return Source(f"ripple/{name}", url, home, "MIT", sha256, _RIPPLE)


REGISTRY: dict[str, Source] = {
    "clare": Source(
        "clare/data.json",
        f"https://raw.githubusercontent.com/manitbaser/CLaRE/{_CLARE}/data.json",
        _GITHUB + "manitbaser/CLaRE",
        "MIT",
        "ce788d61582859ea0b3e390d9dd51920b3f65ad7406a47e65c4991dd4d800c58",
        _CLARE,
        packed="clare.json.xz",
    ),
    "counterfact": _memit(
        "counterfact",
        "counterfact.json",
        seen={
            "d017056125178a13728594e66a801357a8db9ed7973a7425554bb4271de9fc6f": "scalable-model-editing/"
            "rebuilding-rome at 01d0c9f"
        },
    ),
    "multi_counterfact": _memit("counterfact", "multi_counterfact.json"),
    "attribute_snippets": _memit(
        "counterfact",
        "attribute_snippets.json",
        seen={
            "10b5c1cd105e54d5983c72de1b45bfc88bc7af786f7b99def2557886ff23385b": "scalable-model-editing/"
            "rebuilding-rome at 01d0c9f"
        },
    ),
    "zsre_eval": _memit("zsre", "zsre_mend_eval.json"),
    "zsre_train": _memit("zsre", "zsre_mend_train.json"),
    "zsre_edit": _easyedit("zsre", "zsre_mend_edit.json"),
    "counterfact_edit": _easyedit("counterfact", "counterfact-edit.json"),
    "selfcheck_edit": _easyedit("selfcheck", "hallucination-edit.json"),
    "selfcheck_train": _easyedit("selfcheck", "hallucination-train.json"),
    "temporal_edit": _easyedit("temporal", "temporal-edit.json"),
    "temporal_train": _easyedit("temporal", "temporal-train.json"),
    "mquake_cf": _mquake("MQuAKE-CF.json"),
    "mquake_cf_3k": _mquake("MQuAKE-CF-3k.json"),
    "mquake_cf_3k_v2": _mquake("MQuAKE-CF-3k-v2.json"),
    "mquake_t": _mquake("MQuAKE-T.json"),
    "ripple_recent": _ripple(
        "recent.json", "bc71807ea72280e2587bd1974fc79ae7e23aa24b1d5887bcdced40d448910547"
    ),
    "ripple_random": _ripple("random.json"),
    "ripple_popular": _ripple("popular.json"),
}


def fetch(
    name: str,
    *,
    allow_unverified: bool = False,
    registry: dict[str, Source] = REGISTRY,
    downloader: Callable | None = None,
) -> Path:
    """Path of a registered file, downloaded if necessary. It may be compressed (.xz); `base.read` reads either.

    allow_unverified: download a file whose sha256 is not known to editkit; the one found is logged.
    downloader: pooch downloader, `f(url, output_file, pooch)`, for proxies and tests.
    Raises DataError for an unknown name and a wrong hash, its subclass UnavailableError for a file that is neither at
    hand nor downloadable.
    """
    if name not in registry:
        raise DataError(f"unknown corpus file {name!r}; known are {', '.join(sorted(registry))}")
    source = registry[name]
    if source.packed:
        return _checked(name, source, PACKED / source.packed, "install editkit again")
    local = os.environ.get(DATA_ENV)
    if local and (path := user_path(local) / source.file).is_file():
        return _checked(name, source, path, f"replace it by the file from {source.url or source.home}")
    cached = download_dir() / source.file
    if cached.is_file() and (source.sha256 is None or sha256_of(cached) == source.sha256):
        return _checked(name, source, cached, "delete it")
    searched = f"{DATA_ENV} is {'not set' if not local else repr(local) + ' and has no ' + source.file}"
    advice = f"put the file at ${DATA_ENV}/{source.file}, or give a path to the loader"
    if source.url is None:
        raise UnavailableError(f"{name}: editkit knows no address to download it from ({searched}). "
                               f"Get it from {source.home} and {advice}.")  # fmt: skip
    if source.sha256 is None and not allow_unverified:
        raise UnavailableError(
            f"{name}: {searched}. Without a known hash, {source.url} is not downloaded unasked. "
            f"Repeat with allow_unverified=True (`editkit fetch {name} --allow-unverified`), or {advice}."
        )
    import pooch

    try:
        pooch.retrieve(
            source.url,
            known_hash=f"sha256:{source.sha256}" if source.sha256 else None,
            fname=cached.name,
            path=cached.parent,
            downloader=downloader,
        )
    except Exception as error:  # requests, OS and pooch errors: all mean "no file"
        raise UnavailableError(
            f"{name}: {searched}, and {source.url} could not be downloaded ({_reason(error)}). "
            f"Check the connection, or {advice}."
        ) from error
    return _checked(name, source, cached, "delete it")


def _checked(name: str, source: Source, path: Path, remedy: str) -> Path:
    if source.sha256 is not None:
        found = sha256_of(path)
        if found != source.sha256:
            raise DataError(f"{name}: {path} has sha256 {found}, expected {source.sha256}; {remedy}")
    else:
        log.info("%s: hash of %s not known to editkit, taken as it is", name, path)
    return path


def _reason(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".split("\n")[0]
    return text if len(text) <= 200 else text[:197] + "..."
