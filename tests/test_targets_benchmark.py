"""benchmarks/targets.py: the straightforward loop and the library find the same targets."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import make_lm

from editkit.locate.contexts import ContextTemplates
from editkit.locate.targets import TargetConfig, optimize_targets
from editkit.models.hooks import frozen

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "targets.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks are not part of this installation")
CONTEXTS = ContextTemplates.of([["{}"], ["The weather was fine today. {}"]])


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("targets_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gptj"])
@pytest.mark.parametrize(("token", "threshold"), [("subject_last", 0.0), ("last", 2.0)])
def test_both_find_the_same_targets(benchmark, model_type, token, threshold, facts):
    lm = make_lm(model_type, n_layers=3)
    cfg = TargetConfig(lr=0.2, steps=6, clamp_factor=1.5, loss_threshold=threshold)
    facts = [f for f in facts if f.case_id != "1"] if token == "last" else facts
    found = optimize_targets(lm, facts, 1, cfg, contexts=CONTEXTS, token=token)
    assert float((found.z - found.init).norm(dim=0).min()) > 0
    with frozen(lm.model):
        alone = torch.stack([benchmark.one_fact(lm, f, 1, cfg, CONTEXTS, token) for f in facts], dim=1)
    distance = (found.z - alone).norm(dim=0) / alone.norm(dim=0)
    assert float(distance.max()) < 1e-4
