"""Write constraints.txt and environment.yml from the packages installed in the running environment."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_PINNED = {"pip", "wheel", "editkit"}
HEADER = "# The versions everything was tested with (Python 3.11). Written by `make pins`.\n"
CONDA = """\
# For conda users: the same versions as constraints.txt (kept equal by a test). Written by `make pins`.
name: editkit
channels: [conda-forge]
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def installed() -> dict[str, str]:
    """{name: version} of all distributions, without local version suffixes such as +cpu."""
    found = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name and name.lower() not in NOT_PINNED:
            found[name] = distribution.version.split("+")[0]
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def constraints(pins: dict[str, str]) -> str:
    """Text of constraints.txt."""
    return HEADER + "".join(f"{name}=={version}\n" for name, version in pins.items())


def environment(pins: dict[str, str]) -> str:
    """Text of environment.yml: the same pins, then the package itself."""
    return (
        CONDA
        + "".join(f"      - {name}=={version}\n" for name, version in pins.items())
        + '      - "-e .[book,test,real]"\n'
    )


if __name__ == "__main__":
    pins = installed()
    (ROOT / "constraints.txt").write_text(constraints(pins), encoding="utf-8")
    (ROOT / "environment.yml").write_text(environment(pins), encoding="utf-8")
    print(f"{len(pins)} pins written to constraints.txt and environment.yml")
