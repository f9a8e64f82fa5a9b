"""The cost study: shapes, phases, floors, tables, and the notebook of studies/gpu.yaml at a tiny shape."""

import json
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import torch

from editkit.base.device import auto, is_out_of_memory, with_room
from editkit.base.errors import ConfigError
from editkit.methods.presets import find_for, presets
from editkit.models.capacity import memory_plan
from editkit.models.preflight import empty_model
from editkit.press.study import load_study
from editkit.studies.cost import METHODS, SHAPES, Bench, Cost, Phases, Rates, Work, floors, shape_named
from editkit.studies.cost import bench as bench_module
from editkit.studies.cost.bench import DTYPES
from editkit.studies.cost.engines import engine_rows
from editkit.studies.cost.floors import block_parameters, solve
from editkit.studies.cost.tables import exponent, growth, per_thousand, phase_rows, summary

ROOT = Path(__file__).parents[1]
TINY = {"hidden": 64, "layers": 4}
CPU = torch.device("cpu")
RATES = Rates({"float32": 1e9, "float64": 1e9, "bfloat16": 1e9}, 1e9, 8)


@pytest.fixture(scope="module")
def bench():
    made = Bench.open(TINY, device="cpu", n_facts=4, steps=2, tokens_per_batch=512)
    made.measure_moments()
    return made


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_models_with_presets(name):
    shape = SHAPES[name]
    model = empty_model(shape.config())
    sizes = {"gpt2-xl": 1.56, "gpt-j-6b": 6.05, "llama-2-7b": 6.74, "llama-3-8b": 8.03, "mistral-7b": 7.24,
             "qwen2-7b": 7.62}  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(sizes[name], abs=0.01)
    known = {(p.model_type, p.n_layers, p.d_model, p.d_key) for p in presets().values()}
    assert (shape.model_type, shape.layers, shape.hidden, shape.intermediate) in known


def test_a_shape_is_a_name_or_sizes():
    assert shape_named("llama-3-8b").intermediate == 14336 and shape_named(TINY).intermediate == 224
    for bad, words in (("llama-3-9b", "llama-3-8b"), ({"hiden": 64, "layers": 2}, "hidden"),
                       ({"hidden": 65, "layers": 2}, "divide the width")):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            shape_named(bad)
    with pytest.raises(ConfigError, match="vocabulary of 100"):
        Bench.open({**TINY, "vocab": 100}, device="cpu", n_facts=1)


def test_equal_seeds_give_equal_weights_and_leave_the_global_seed(bench):
    before = torch.random.get_rng_state()
    again = Bench.open(TINY, device="cpu", n_facts=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert again.lm.fingerprint() == bench.lm.fingerprint()
    half = Bench.open(TINY, device="cpu", dtype="bfloat16", n_facts=1)
    assert half.lm.dtype == DTYPES["bfloat16"] and half.weight_bytes * 2 == again.weight_bytes


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_cost_and_a_floor_and_leaves_the_model_alone(bench, method):
    before = bench.lm.fingerprint()
    cost = bench.cost(method, 2)
    assert bench.lm.fingerprint() == before and not cost.failed
    assert cost.total > 0 and cost.needed > 0 and set(cost.seconds) == set(cost.peak)
    assert "forward" in cost.seconds
    least = floors(bench, method, 2)
    assert set(least) <= set(cost.seconds) and all(w.flops > 0 or w.bytes > 0 for w in least.values())
    rows = phase_rows(bench, cost, RATES)
    assert {r["phase"] for r in rows if r["floor"]} == set(least)
    twice = floors(bench, method, 4)
    assert sum(w.flops for w in twice.values()) > 1.05 * sum(w.flops for w in least.values())


def test_published_settings_at_the_shape_of_a_published_model(bench):
    class Full(Bench):
        def __init__(self, lm):
            self.lm, self.edited, self.steps, self.tokens_per_batch = lm, 2, 0, 8192

    class Named:
        name = "a model"
        model = empty_model(SHAPES["llama-3-8b"].config())
        n_layers, d_model, d_key = 32, 4096, 14336

    assert find_for(Named()).name == "Llama-3-8B-Instruct"
    full = Full(Named())
    assert full.settings("memit")["layers"] == [4, 5, 6, 7, 8] and full.settings("memit")["z_steps"] == 25
    assert full.settings("memoir")["k"] == 4096 and full.settings("horse")["rank"] == 1920
    assert bench.settings("memit")["layers"] == [0, 1] and len(bench.settings("horse")["modules"]) == 2


def test_phases_interrupt_each_other_and_add_up():
    phases = Phases(CPU)
    clock = iter(range(100))
    phases._clock = lambda: next(clock)
    with phases.phase("before it counts"):
        pass
    with phases.measured():
        with phases.phase("outer"), phases.phase("inner"):
            pass
        with phases.phase("inner"):
            pass
    assert phases.seconds == {"other": 3, "outer": 2, "inner": 2}


def test_phases_see_memory():
    phases = Phases(CPU)
    with phases.measured(), phases.phase("large"):
        kept = torch.ones(8 * 2**20)
    assert 0.9 * 32 * 2**20 < phases.peak["large"] < 2 * 32 * 2**20 and kept.sum() > 0


def test_one_method_out_of_memory_does_not_stop_the_others(bench, monkeypatch):
    def fails(self, method, n, phases):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")

    monkeypatch.setitem(bench_module._RUN, "clare", fails)
    costs = list(bench.costs("clare", [1, 2, 4]))
    assert len(costs) == 1 and "out of memory: predicted" in costs[0].failed
    row = summary(costs, bench.weight_bytes)
    assert row["s per 1,000"] is None and row["note"] == costs[0].failed and row["predicted rise GiB"] > 0
    monkeypatch.setattr(bench_module, "free_memory", lambda: {"host": 10})
    cost = bench.cost("memit", 1)
    assert cost.failed.startswith("not tried: needs") and not cost.seconds

    def breaks(self, method, n, phases):
        raise RuntimeError("shapes do not fit")

    monkeypatch.undo()
    monkeypatch.setitem(bench_module._RUN, "clare", breaks)
    with pytest.raises(RuntimeError, match="shapes"):
        bench.cost("clare", 1)
    with pytest.raises(ConfigError, match="facts for 1 to 4"):
        bench.cost("clare", 5)


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
    assert not is_out_of_memory(ValueError("out of memory")) and not is_out_of_memory(RuntimeError("size"))
    assert with_room(CPU, 10**18) == CPU and auto("cpu") == CPU and auto().type


def test_thousand_edits_are_measured_or_said_to_be_extrapolated():
    def cost(n, seconds):
        return Cost("memit", n, {"targets": seconds, "hash (once)": 100.0}, {"targets": 1.0}, 1.0)

    assert per_thousand([cost(1, 3.0), cost(10, 12.0)]) == (1002.0, "line through 1 and 10")
    assert per_thousand([cost(10, 3.0), cost(1000, 40.0)]) == (40.0, "measured")
    assert per_thousand([cost(10, 3.0)]) == (300.0, "proportional to 10")
    assert per_thousand([cost(5, 4.0), cost(10, 3.0)]) == (300.0, "proportional to 10")
    assert per_thousand([Cost("memit", 1, {}, {}, 1.0, "failed")]) == (None, "not measured")


def test_floors_are_what_the_formulas_say(bench):
    lm = bench.lm
    m, d = 64, 224
    assert block_parameters(lm) == 3 * m * d + 2 * m * 64 + 2 * m * 32
    assert solve("memit", m, d, 2, 3).flops == 3 * (2 * d * d + d**3 / 3 + 4 * d * d + 4 * m * d)
    many = solve("memit", m, d, 1000, 1)
    assert many.flops == 1000 * d * d + d**3 / 3 + 2 * d * d * m + 2000 * m * d
    work = Work(2e9, 1e9, "float64")
    assert work.seconds(RATES) == 2.0 and work.bound(RATES) == "arithmetic"
    assert Work(1.0, 5e9, "float32").bound(RATES) == "memory"
    assert floors(bench, "alphaedit", 2)["solve"].flops > floors(bench, "memit", 2)["solve"].flops


def test_exponents():
    x = [1, 2, 4, 8]
    assert exponent(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)
    frame = pd.DataFrame({"edits": x, "method": "m", "phase": "p", "seconds": x, "floor": [v**2 for v in x]})
    assert growth(frame, "edits").iloc[0][["exponent", "of the floor"]].tolist() == pytest.approx([1.0, 2.0])
    assert growth(frame.assign(seconds=1e-6), "edits").empty


def test_engines_are_compared():
    rows = engine_rows(CPU, 48, 16, 4, batches=2)
    assert [r["engine"] for r in rows] == ["direct", "inverse", "cholesky"]
    assert rows[0]["times faster than direct"] == 1.0 and all(r["batch"] > 0 for r in rows)


def test_the_first_batch_has_no_history_while_targets_are_optimised(bench):
    plan = memory_plan(bench.lm, [0, 1], torch.float32, "alphaedit", 100_000)
    assert plan.targets > plan.solve and plan.first < plan.beside == plan.history + plan.targets


def run_notebook(parameters: dict) -> dict:
    """Execute the notebook's cells here, with other parameters; its variables."""
    matplotlib.use("Agg")
    cells = json.loads((ROOT / "notebooks" / "cost_shapes.ipynb").read_text())["cells"]
    scope: dict = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        exec("".join(cell["source"]), scope)
        if "parameters" in cell["metadata"].get("tags", []):
            assert set(parameters) <= set(scope), "a parameter that the notebook does not declare"
            scope.update(parameters)
    return scope


def test_the_notebook_of_the_gpu_study_runs_at_a_tiny_shape(tmp_path, monkeypatch):
    """Every run of studies/gpu.yaml, with its own parameters where they do not make it large."""
    small = {
        "shape": TINY,
        "device": "cpu",
        "rate_size": 32,
        "steps": 2,
        "n_edits": [2, 3],
        "moment_tokens": 300,
    }
    runs = load_study(ROOT / "studies" / "gpu.yaml").runs
    chosen = {
        json.dumps(r.parameters.get("methods")): r for r in runs if r.notebook.endswith("cost_shapes.ipynb")
    }
    assert len(chosen) == 2 and all(r.gpus == 1 for r in runs)
    for spec in chosen.values():
        more = {"engine_width": 32} if spec.parameters.get("engine_width", 1) else {}
        if more:
            more |= {
                "widths": [64],
                "depths": [2],
                "growth_edits": 2,
                "growth_methods": ["clare"],
                "memory_widths": [64],
            }
        scope = run_notebook({**spec.parameters, **small, **more})
        run, methods = scope["run"], spec.parameters.get("methods", list(METHODS))
        assert run.tables["methods"]["rows"] == len(methods)
        for method in methods:
            assert run.numbers[f"{method}.thousand"]["value"] > 0 and run.numbers[f"{method}.peak"]["value"] > 0
        assert run.numbers["device"]["value"] == "CPU"
