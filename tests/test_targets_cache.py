"""Targets kept by content: shared between methods, missed when anything that decides them differs."""

import dataclasses

import pytest
import torch
from conftest import SENTENCES, make_lm

from editkit.base import cached, sources
from editkit.base.errors import DataError
from editkit.locate import targets
from editkit.locate.moments import second_moment
from editkit.locate.targets import TargetConfig, optimize_targets
from editkit.methods import make_editor

CONTEXTS = [["{}"], ["The weather was fine today. {}"]]
Z = {"z_lr": 0.3, "z_steps": 3, "z_clamp_factor": 2.0}


@pytest.fixture
def made(monkeypatch):
    """Counts the optimisations that really run."""
    calls = []
    real = targets._optimize_all
    monkeypatch.setattr(targets, "_optimize_all", lambda *args: (calls.append(1), real(*args))[1])
    return calls


def test_two_methods_share(tmp_path, facts, made):
    lm = make_lm("llama", n_layers=3)
    moments = second_moment(lm, [1, 2], SENTENCES)
    options = {"layers": [1, 2], "contexts": CONTEXTS, "statistics": moments, "cache_dir": tmp_path, **Z}
    first, second = {}, {}
    with_cache = make_editor("memit", lm, lam=10.0, record=first.__setitem__, **options)
    with_cache.edit(facts)
    with_cache.restore()
    make_editor("alphaedit", lm, threshold=0.5, record=second.__setitem__, **options).edit(facts)
    assert len(made) == 1 and len(list(tmp_path.glob("targets_*.safetensors"))) == 1
    assert torch.equal(first["z"], second["z"]) and torch.equal(
        first["zloss"].isnan(), second["zloss"].isnan()
    )
    # The second batch of a stream belongs to edited weights.
    make_editor("memit", lm, lam=10.0, **options).edit([fact.replace(target="Rome") for fact in facts])
    assert len(made) == 2


def test_what_is_found_is_what_was_optimised(tmp_path, facts, made):
    lm = make_lm("gpt2")
    plain = optimize_targets(lm, facts, 1, TargetConfig(steps=3), contexts=CONTEXTS)
    for _ in range(2):
        found = optimize_targets(lm, facts, 1, TargetConfig(steps=3), contexts=CONTEXTS, cache_dir=tmp_path)
        assert torch.equal(found.z, plain.z) and torch.equal(found.init, plain.init)
        assert torch.equal(found.losses.nan_to_num(-1), plain.losses.nan_to_num(-1))
    assert len(made) == 2


def test_every_ingredient_counts(tmp_path, facts, made):
    lm = make_lm("gpt2")
    cfg = TargetConfig(steps=2)
    base = {"lm": lm, "facts": facts, "layer": 1, "cfg": cfg, "contexts": CONTEXTS, "token": "subject_last"}

    def missed(**changes):
        made.clear()
        optimize_targets(**{**base, "cache_dir": tmp_path, **changes})
        return bool(made)

    assert missed() and not missed()
    others = {
        "lr": 0.4, "steps": 3, "weight_decay": 0.4, "clamp_factor": 0.5, "kl_factor": 0.1, "loss_threshold": 0.01,
        "loss_layer": 1, "decay_form": "norm2_over_norm2", "kl_direction": "original_edited", "kl_prompt": "{} was",
        "final_step": True, "tokens_per_batch": 64, "reuse_prefix": False, "products": "bfloat16",
    }  # fmt: skip
    assert set(others) == {f.name for f in dataclasses.fields(TargetConfig)}
    for name, value in others.items():
        assert missed(cfg=cfg.replace(**{name: value}) if hasattr(cfg, "replace")
                      else dataclasses.replace(cfg, **{name: value})), name  # fmt: skip
    for fact in ({"target": "Rome"}, {"subject": "Li Li"}, {"prompt": "I think that {} is"}):
        assert missed(facts=[facts[0].replace(**fact), *facts[1:]]), fact
    assert not missed(facts=[facts[0].replace(paraphrases=("Ana",)), *facts[1:]])  # probes do not matter
    changes = [
        {"facts": facts[::-1]}, {"facts": facts[:-1]}, {"layer": 0}, {"module": "mlp"}, {"token": "last"},
        {"contexts": CONTEXTS[:1]}, {"contexts": [["{}", CONTEXTS[1][0]]]}, {"lm": make_lm("gpt2", seed=1)},
        {"lm": make_lm("gpt2", "bytelevel_trim")},
    ]  # fmt: skip
    for change in changes:
        assert missed(**change), change
    assert not missed()
    half = make_lm("gpt2")
    half.model.to(torch.bfloat16)
    assert missed(lm=half)
    with torch.no_grad():
        lm.weight(0)[0, 0] += 1
    assert missed()


def test_a_broken_file_is_named(tmp_path, facts):
    lm = make_lm("gpt2")
    optimize_targets(lm, facts, 1, TargetConfig(steps=1), cache_dir=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(b"half a file")
    with pytest.raises(DataError, match=file.name):
        optimize_targets(lm, facts, 1, TargetConfig(steps=1), cache_dir=tmp_path)


@pytest.mark.parametrize("what", ["source", "library"])
def test_targets_of_other_code_are_not_found(tmp_path, facts, made, monkeypatch, what):
    """A fix in the optimiser, or another torch: the old targets do not come back."""
    lm = make_lm("gpt2")
    for _ in range(2):
        optimize_targets(lm, facts, 1, TargetConfig(steps=1), contexts=CONTEXTS, cache_dir=tmp_path)
    assert len(made) == 1
    if what == "source":
        real = sources.code_hash
        sources._source_hash.cache_clear()
        monkeypatch.setattr(sources, "code_hash", lambda text: real(text + "\nfixed = True"))
    else:
        monkeypatch.setattr(cached.metadata, "version", lambda name: "0.1")
    optimize_targets(lm, facts, 1, TargetConfig(steps=1), contexts=CONTEXTS, cache_dir=tmp_path)
    sources._source_hash.cache_clear()
    assert len(made) == 2


def test_the_source_of_targets_is_all_that_they_call():
    """What the module imports, and what that imports; not who calls it, and not words."""
    seen, queue = set(), [sources.PACKAGE / "locate" / "targets.py"]
    while queue:
        path = queue.pop()
        if path not in seen:
            seen.add(path)
            queue += sources._imports(path)
    names = {path.relative_to(sources.PACKAGE).as_posix() for path in seen}
    assert {"locate/targets.py", "locate/contexts.py", "models/hooks.py", "models/lm.py"} <= names
    assert not [name for name in names if name.startswith(("methods/", "press/", "studies/"))]
