"""Presets: every value is an option, has a source, and the figures are those of the fact sheets."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest
import torch
from conftest import make_lm

from editkit.base.errors import ConfigError
from editkit.methods import EDITORS, make_editor
from editkit.methods import presets as package
from editkit.methods.hypernet import METHODS, TrainConfig
from editkit.methods.presets import Preset, Setting, find, find_for, presets, shape_of

MODELS = ("GPT2-XL", "GPT-J-6B", "Llama-2-7B", "Llama-3-8B-Instruct", "Mistral-7B", "Qwen2.5-7B", "SmolLM2-135M")
# Methods of this book, or of papers that edit no language model: no published figure for any of these models.
NO_FIGURES = {
    "regularized", "in_context", "retrieval", "loka", "packnet", "supsup", "gpm", "sparcl"
}  # fmt: skip


SWEEP = "this book's sweep, notebooks/real_presets.ipynb"


def everywhere(kind):
    return [(name, method) for name, preset in presets().items() for method in preset.methods(kind)]


def test_all_models_of_the_papers_and_all_methods():
    assert sorted(presets()) == sorted(MODELS)
    for name in MODELS:
        missing = set(EDITORS) - set(METHODS) - set(presets()[name].methods()) - NO_FIGURES
        assert not missing, f"{name}: {missing}"
        assert (
            set(presets()[name].methods("network"))
            == set(METHODS)
            == set(presets()[name].methods("training"))
        )


@pytest.mark.parametrize(("name", "method"), everywhere("editor"))
def test_options_of_editors_are_accepted(name, method):
    config = EDITORS[method].Config.make(find(name).options(method))
    layers = getattr(config, "layers", None) or [getattr(config, "layer", None) or 0]
    assert max(layers) < find(name).n_layers


@pytest.mark.parametrize(("name", "method"), everywhere("network"))
def test_options_of_hypernetworks_are_accepted(name, method):
    preset = find(name)
    options = preset.options(method, "network")
    modules = options.pop("modules")
    METHODS[method].Config.make(options)
    TrainConfig.make(preset.options(method, "training"))
    # the modules exist: in a two-layer model of the class, once the layer number is taken off
    lm = make_lm(preset.model_type)
    blocks = lm.spec.blocks
    for path in modules:
        layer, rest = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", path).groups()
        assert int(layer) < preset.n_layers
        lm.model.get_submodule(f"{blocks}.0.{rest}")


def test_every_value_says_where_it_comes_from():
    for preset in presets().values():
        for row in preset.rows():
            assert row["source"] and row["status"] in ("published", "inherited", "swept")
            assert (row["source"] == SWEEP) == (row["status"] == "swept") or row["status"] == "inherited"
            if row["status"] == "inherited":
                assert row["note"], f"{row}: say from where"


SHEET = [
    # baselines.md sections 1 to 6 and 8, labyrinth.md sections 3 and 9
    ("GPT2-XL", "memit", {"layers": [13, 14, 15, 16, 17], "z_lr": 0.5, "z_steps": 20, "lam": 20000.0}),
    ("GPT-J-6B", "memit", {"layers": [3, 4, 5, 6, 7, 8], "z_steps": 25, "z_loss_layer": 27, "lam": 15000.0}),
    ("Llama-3-8B-Instruct", "memit", {"z_lr": 0.1, "z_clamp_factor": 0.75, "z_weight_decay": 0.5}),
    ("Llama-2-7B", "memit", {"z_lr": 0.5, "z_clamp_factor": 4.0, "z_weight_decay": 0.001}),
    ("Qwen2.5-7B", "memit_seq", {"z_loss_layer": 27, "history": True, "layers": [4, 5, 6, 7, 8]}),
    ("GPT-J-6B", "alphaedit", {"threshold": 0.02, "ridge": 10.0}),
    ("Qwen2.5-7B", "alphaedit", {"ridge": 1.0}),
    ("GPT-J-6B", "nse", {"neuron_threshold": 0.8, "alpha": 15.0, "upper_bound": 100.0}),
    ("GPT2-XL", "rome", {"layers": [17], "whiten": True, "z_clamp_factor": 4.0}),
    ("Mistral-7B", "rome", {"layers": [5], "whiten": False, "z_weight_decay": 0.001, "z_steps": 25}),
    ("GPT-J-6B", "ft", {"layers": [0], "limit": 5e-5, "objective": "prompt_last"}),
    ("Llama-2-7B", "grace", {"layer": 27, "steps": 50, "radius": 1.0}),
    ("GPT-J-6B", "wise", {"layer": 21, "alpha": 15.0, "beta": 40.0, "gamma": 20.0}),
    ("Llama-3-8B-Instruct", "memoir", {"layer": 27, "k": 4096, "threshold": 0.4, "steps": 30}),
]


@pytest.mark.parametrize(("name", "method", "figures"), SHEET)
def test_figures_are_those_of_the_sheets(name, method, figures):
    found = find(name).options(method)
    assert {k: found[k] for k in figures} == figures


def test_alphaedit_takes_the_place_but_not_the_weight_of_memit():
    for preset in presets().values():
        own, memit = preset.options("alphaedit"), preset.options("memit")
        assert "lam" not in own and own["layers"] == memit["layers"] and own["z_lr"] == memit["z_lr"]


def test_names_of_the_hub_find_the_preset():
    assert find("openai-community/gpt2-xl") is find("GPT2-XL") is find("gpt2-XL")
    with pytest.raises(ConfigError, match="did you mean 'Mistral-7B'"):
        find("Mistral-7")
    with pytest.raises(ConfigError, match="method of the GPT2-XL preset"):
        find("GPT2-XL").options("memitt")


def test_options_are_fresh():
    find("GPT2-XL").options("memit")["layers"].append(99)
    assert 99 not in find("GPT2-XL").options("memit")["layers"]


def fitted(lm) -> Preset:
    """A preset that the tiny model matches."""
    own = {"layers": Setting([1], "test"), "lam": Setting(7.0, "test"), "z_steps": Setting(2, "test")}
    return Preset("tiny", ("hub/tiny",), *shape_of(lm), settings={"editor": {"memit": own}})


def test_make_editor_takes_a_preset_and_changes_on_top(monkeypatch):
    lm = make_lm("llama")
    monkeypatch.setattr(package, "presets", lambda: {"tiny": fitted(lm)})
    C = {1: torch.eye(lm.d_key, dtype=torch.float64)}
    for preset in ("auto", "tiny", "hub/tiny"):
        editor = make_editor("memit", lm, preset=preset, lam=3.0, statistics=C)
        assert (editor.config.layers, editor.config.lam, editor.config.z_steps) == ((1,), 3.0, 2)
    assert find_for(lm).name == "tiny"
    with pytest.raises(ConfigError, match="method of the tiny preset"):
        make_editor("rome", lm, preset="auto", statistics=C)


def test_a_preset_of_another_model_is_refused():
    lm = make_lm("llama")
    with pytest.raises(
        ConfigError, match=r"a llama of 32 layers, width 4096, MLP 14336; .* is a llama of 2 layers"
    ):
        make_editor("memit", lm, preset="Llama-3-8B-Instruct")
    with pytest.raises(ConfigError, match="no preset fits"):
        make_editor("memit", lm, preset="auto")


def test_shapes_of_the_real_models_differ():
    assert len({p.shape for p in presets().values()}) == len(presets())
    assert dataclasses.asdict(find("GPT-J-6B"))["d_key"] == 16384


def test_the_page_shows_what_the_package_has():
    tool = Path(__file__).parents[1] / "tools" / "presets_page.py"
    if not tool.is_file():
        pytest.skip("the book is not part of this installation")
    module = runpy.run_path(str(tool))
    assert module["PAGE"].read_text(encoding="utf-8") == module["page"](), "run python tools/presets_page.py"
