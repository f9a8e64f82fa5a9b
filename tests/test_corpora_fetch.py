"""Finding, downloading and checking corpus files, without a network."""

import argparse
import hashlib

import pytest

from editkit.base.downloads import DOWNLOADS_ENV
from editkit.base.errors import DataError
from editkit.corpora import command, fetch

CONTENT = b'[{"prompt": "{} plays the", "subject": "Bram Holt", "target": "cello"}]'
SHA = hashlib.sha256(CONTENT).hexdigest()


def source(sha256=SHA, url="https://data.invalid/tiny.json"):
    return fetch.Source("tiny/data.json", url, "https://data.invalid", "MIT", sha256)


def deliver(content):
    def downloader(url, output_file, pooch):
        with open(output_file, "wb") as handle:
            handle.write(content)

    return downloader


def refuse(url, output_file, pooch):
    raise AssertionError("no download expected")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """An empty download folder, and no offline folder."""
    monkeypatch.delenv(fetch.DATA_ENV, raising=False)
    monkeypatch.setenv(DOWNLOADS_ENV, str(tmp_path / "downloads"))
    return tmp_path


def offline(folder, monkeypatch, content=CONTENT):
    path = folder / "offline" / "tiny" / "data.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    monkeypatch.setenv(fetch.DATA_ENV, str(folder / "offline"))
    return path


def test_registry_is_well_formed():
    files = [s.file for s in fetch.REGISTRY.values()]
    assert len(set(files)) == len(files)
    for name, s in fetch.REGISTRY.items():
        assert s.url is None or s.url.startswith("https://"), name
        assert s.licence and s.home.startswith("https://"), name
        assert all(len(h) == 64 for h in (s.sha256, *s.seen) if h is not None), name
        assert s.commit is None or (len(s.commit) == 40 and s.commit in s.url), name


def test_offline_folder_comes_first(places, monkeypatch):
    path = offline(places, monkeypatch)
    assert fetch.fetch("tiny", registry={"tiny": source()}, downloader=refuse) == path


def test_offline_copy_is_checked(places, monkeypatch):
    offline(places, monkeypatch, CONTENT + b" ")
    with pytest.raises(DataError, match=f"sha256 .*expected {SHA}; replace it by"):
        fetch.fetch("tiny", registry={"tiny": source()}, downloader=refuse)


def test_download_is_checked_and_kept(places):
    registry = {"tiny": source()}
    path = fetch.fetch("tiny", registry=registry, downloader=deliver(CONTENT))
    assert path == places / "downloads" / "tiny" / "data.json" and path.read_bytes() == CONTENT
    assert fetch.fetch("tiny", registry=registry, downloader=refuse) == path
    path.write_bytes(b"damaged")  # a damaged copy is replaced, not used
    assert fetch.fetch("tiny", registry=registry, downloader=deliver(CONTENT)).read_bytes() == CONTENT


def test_wrong_download_is_refused(places):
    with pytest.raises(
        DataError, match=r"EDITKIT_DATA is not set, and https://data\.invalid/tiny\.json could not"
    ):
        fetch.fetch("tiny", registry={"tiny": source()}, downloader=deliver(b"something else"))
    assert not list((places / "downloads").rglob("*.json"))


def test_no_connection_names_variable_and_address(places, monkeypatch):
    def fail(url, output_file, pooch):
        raise ConnectionError("no route")

    monkeypatch.setenv(fetch.DATA_ENV, str(places / "empty"))
    with pytest.raises(DataError) as error:
        fetch.fetch("tiny", registry={"tiny": source()}, downloader=fail)
    for text in ("EDITKIT_DATA", "has no tiny/data.json", "https://data.invalid/tiny.json", "no route"):
        assert text in str(error.value)


def test_unknown_hash_needs_consent(places, monkeypatch):
    registry = {"tiny": source(sha256=None)}
    with pytest.raises(DataError, match="allow_unverified=True"):
        fetch.fetch("tiny", registry=registry, downloader=refuse)
    path = fetch.fetch("tiny", registry=registry, allow_unverified=True, downloader=deliver(CONTENT))
    assert fetch.fetch("tiny", registry=registry, downloader=refuse) == path
    own = offline(places, monkeypatch, b"[]")  # a copy the user put there needs no consent
    assert fetch.fetch("tiny", registry=registry, downloader=refuse) == own


def test_file_without_address(places):
    with pytest.raises(DataError, match=r"knows no address.*Get it from https://data\.invalid"):
        fetch.fetch("tiny", registry={"tiny": source(url=None)}, allow_unverified=True, downloader=refuse)


def test_unknown_name():
    with pytest.raises(DataError, match=r"unknown corpus file 'clarre'; known are .*clare"):
        fetch.fetch("clarre")


def run(*argv):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["fetch", *argv])
    return args.func(args)


def test_command(places, monkeypatch, capsys):
    monkeypatch.setitem(fetch.REGISTRY, "tiny", source())
    path = offline(places, monkeypatch)
    assert run("tiny") == 0
    out = capsys.readouterr().out
    assert str(path) in out and f"sha256 {SHA} (checked)" in out and "licence: MIT" in out
    assert run() == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in fetch.REGISTRY)
    assert run("tiny", "no-such") == 1
    assert "unknown corpus file 'no-such'" in capsys.readouterr().err


def test_command_says_when_unverified(places, monkeypatch, capsys):
    offline(places, monkeypatch)
    monkeypatch.setitem(fetch.REGISTRY, "tiny", source(sha256=None))
    assert run("tiny") == 0
    assert "(unverified)" in capsys.readouterr().out
