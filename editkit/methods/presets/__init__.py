"""Published hyper-parameters of the methods on the models of the papers, each value with its source.

    options = find("Llama-3-8B-Instruct").options("memit")
    editor = make_editor("memit", lm, preset="auto", statistics=...)    # by the model's shape

One TOML file per model. A value is "published" for this model and method, "swept": chosen by this book's own sweep on
the model, or "inherited": taken over from another model's or method's file, and not tuned. Options of editors, of
hypernetworks and of their training are apart:

    [[editor.memit]]      options of make_editor("memit")
    [[network.horse]]     options of hypernet.make_hypernetwork("horse")
    [[training.horse]]    options of hypernet.TrainConfig

`like` takes over the options of another method of the file, `without` leaves some of them out. Published options
that editkit has no counterpart for are left out; they are in the chapters on the methods.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Literal, get_args

from ...base.config import check_known
from ...base.errors import ConfigError
from ...models.lm import LM

Kind = Literal["editor", "network", "training"]
Status = Literal["published", "inherited", "swept"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One value. source: where it was read.

    status: "published" for this model, "swept" on it by this book, or "inherited", not tuned.
    """

    value: Any
    source: str
    status: Status = "published"
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Preset:
    """The settings for one model. ids: its names on the Hub.   settings: kind -> method -> option -> Setting."""

    name: str
    ids: tuple[str, ...]
    model_type: str
    n_layers: int
    d_model: int
    d_key: int
    settings: Mapping[str, Mapping[str, Mapping[str, Setting]]]

    @property
    def shape(self) -> tuple[str, int, int, int]:
        """(model type, layers, value width m, key width d)."""
        return self.model_type, self.n_layers, self.d_model, self.d_key

    def methods(self, kind: Kind = "editor") -> list[str]:
        """Names of the methods with settings."""
        return list(self.settings.get(kind, {}))

    def options(self, method: str, kind: Kind = "editor") -> dict[str, Any]:
        """Plain options of a method, a fresh dictionary. Raises ConfigError for a method without settings."""
        check_known([kind], get_args(Kind), "kind of preset")
        check_known([method], self.methods(kind), f"method of the {self.name} preset ({kind})")
        found = self.settings[kind][method]
        return {k: list(s.value) if isinstance(s.value, list) else s.value for k, s in found.items()}

    def check(self, lm: LM) -> None:
        """Raise ConfigError unless the model has the preset's architecture and shape."""
        if shape_of(lm) != self.shape:
            raise ConfigError(
                f"the preset {self.name} is for {describe(self.shape)}; {lm.name} is {describe(shape_of(lm))}: "
                "choose another preset, or give the options yourself"
            )

    def rows(self) -> list[dict[str, Any]]:
        """One row per value: model, kind, method, option, value, source, status, note."""
        return [
            {"model": self.name, "kind": kind, "method": method, "option": option, **dataclasses.asdict(s)}
            for kind, methods in self.settings.items()
            for method, options in methods.items()
            for option, s in options.items()
        ]


def shape_of(lm: LM) -> tuple[str, int, int, int]:
    """(model type, layers, m, d) of a loaded model."""
    return lm.model.config.model_type, lm.n_layers, lm.d_model, lm.d_key


def describe(shape: tuple[str, int, int, int]) -> str:
    """A shape in words."""
    return f"a {shape[0]} of {shape[1]} layers, width {shape[2]}, MLP {shape[3]}"


@functools.cache
def presets() -> Mapping[str, Preset]:
    """All presets by name."""
    folder = files(__name__)
    sources = tomllib.loads((folder / "sources.toml").read_text("utf-8"))
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".toml") and f.name != "sources.toml")
    found = [_read(tomllib.loads((folder / name).read_text("utf-8")), sources) for name in names]
    return {preset.name: preset for preset in found}


def find(name: str) -> Preset:
    """The preset by its name or a name of its model on the Hub, whatever the case. Raises ConfigError."""
    known = {key.lower(): p for p in presets().values() for key in (p.name, *p.ids)}
    if name.lower() not in known:
        check_known([name], [*presets(), "auto"], "preset")
    return known[name.lower()]


def find_for(lm: LM) -> Preset:
    """The preset of a loaded model: by its name on the Hub, else by its architecture and shape.

    Raises ConfigError if there is none.
    """
    for preset in presets().values():
        if lm.name.lower() in {x.lower() for x in preset.ids} and shape_of(lm) == preset.shape:
            return preset
    for preset in presets().values():
        if shape_of(lm) == preset.shape:
            return preset
    raise ConfigError(
        f"no preset fits {lm.name}, {describe(shape_of(lm))}; there are presets for {', '.join(presets())}. Give the "
        "options yourself: the page 'Your own model' says how to choose them"
    )


def options_for(lm: LM, method: str, preset: str) -> dict[str, Any]:
    """Options of an editor on a model; preset: a name, or "auto" for the one of the model's shape."""
    chosen = find_for(lm) if preset == "auto" else find(preset)
    chosen.check(lm)
    return chosen.options(method)


def _read(data: dict[str, Any], sources: Mapping[str, str]) -> Preset:
    settings: dict[str, dict[str, dict[str, Setting]]] = {}
    for kind in get_args(Kind):
        methods = settings.setdefault(kind, {})
        for method, groups in data.get(kind, {}).items():
            options = methods.setdefault(method, {})
            for group in groups:
                if "like" in group:
                    left_out = group.get("without", ())
                    options |= {k: s for k, s in methods[group["like"]].items() if k not in left_out}
                about = group.get("status", "published"), group.get("note", "")
                for option, value in group.get("options", {}).items():
                    options[option] = Setting(value, sources[group["source"]], *about)
    head = {k: data[k] for k in ("name", "model_type", "n_layers", "d_model", "d_key")}
    return Preset(**head, ids=tuple(data["ids"]), settings=settings)
