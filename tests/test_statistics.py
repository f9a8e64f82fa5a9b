"""Second moments: against direct computation and recordings; cache; storage; refusals."""

import json

import numpy as np
import pytest
import torch
from conftest import SENTENCES, make_lm
from safetensors.torch import save_file

from editkit.base.errors import ConfigError, DataError, ModelError, NumericsError, RequestError
from editkit.locate.moments import Covariance, second_moment


def direct_moment(lm, layer, texts):
    total, n, seen = 0, 0, {}
    handle = lm.model.get_submodule(lm.down_name(layer)).register_forward_pre_hook(
        lambda m, args: seen.update(x=args[0])
    )
    for text in texts:
        with torch.no_grad():
            lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]]))
        X = seen["x"][0].double()
        total, n = total + X.T @ X, n + len(X)
    handle.remove()
    return total / n, n


def test_equals_direct_computation(any_lm):
    found = second_moment(any_lm, [1, 0], SENTENCES, tokens_per_batch=70)
    assert list(found) == [0, 1]
    for layer, moment in found.items():
        C, n = direct_moment(any_lm, layer, SENTENCES)
        assert moment.n == n and moment.d == any_lm.d_key and moment.C.dtype == torch.float64
        assert torch.allclose(moment.C, C, atol=1e-6)
        assert torch.equal(moment.C, moment.C.T)
        assert torch.linalg.eigvalsh(moment.C).min() > -1e-9
        assert moment.provenance["fingerprint"] == any_lm.fingerprint()
        assert moment.provenance["layer"] == layer


def test_budget_bounds_every_batch_and_does_not_change_the_result(tiny_lm, monkeypatch):
    lm = tiny_lm(tokenizer="bos")
    sizes = []
    forward = lm.forward
    monkeypatch.setattr(lm, "forward", lambda batch: (sizes.append(batch.input_ids.numel()), forward(batch)))
    small = second_moment(lm, [0], SENTENCES, tokens_per_batch=40)[0]
    assert max(sizes) <= 40 and len(sizes) > 1
    large = second_moment(lm, [0], SENTENCES, tokens_per_batch=5000)[0]
    assert small.n == large.n and torch.allclose(small.C, large.C, atol=1e-6)


def test_long_texts_are_cut(tiny_lm):
    lm = tiny_lm(tokenizer="wordlevel")
    found = second_moment(lm, [0], ["the old house " * 50], tokens_per_batch=1000)[0]
    assert found.n == lm.max_tokens == found.provenance["max_length"]
    assert second_moment(lm, [0], ["the old house " * 50], tokens_per_batch=10)[0].n == 10


def test_stops_after_the_last_needed_layer(tiny_lm):
    lm = tiny_lm(n_layers=3)
    ran = []
    lm.model.get_submodule(lm.block_name(2)).register_forward_hook(lambda *_: ran.append(1))
    second_moment(lm, [0, 1], SENTENCES)
    assert not ran


def test_float32_accumulation(tiny_lm):
    lm = tiny_lm()
    fast = second_moment(lm, [0], SENTENCES, dtype=torch.float32)[0]
    exact = second_moment(lm, [0], SENTENCES)[0]
    assert fast.C.dtype == torch.float64 and torch.allclose(fast.C, exact.C, atol=1e-5)


def test_cache_is_used_and_keyed_by_everything(tmp_path, monkeypatch):
    lm = make_lm()
    first = second_moment(lm, [0, 1], SENTENCES, cache_dir=tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2
    runs = []
    forward = type(lm).forward
    monkeypatch.setattr(
        type(lm), "forward", lambda self, batch, **kw: (runs.append(1), forward(self, batch, **kw))[1]
    )
    again = second_moment(lm, [1], SENTENCES, cache_dir=tmp_path)
    assert not runs
    assert torch.equal(again[1].C, first[1].C) and again[1].provenance == first[1].provenance
    changes = [
        {"texts": SENTENCES[:-1]},
        {"texts": SENTENCES[::-1]},
        {"tokens_per_batch": 100},
        {"dtype": torch.float32},
    ]
    for change in changes:
        runs.clear()
        second_moment(lm, [1], **{"texts": SENTENCES, "cache_dir": tmp_path, **change})
        assert runs, change
    for other in (make_lm(seed=1), make_lm(tokenizer="bytelevel_trim"), make_lm(tokenizer="bos")):
        runs.clear()
        second_moment(other, [1], SENTENCES, cache_dir=tmp_path)
        assert runs
    runs.clear()
    with torch.no_grad():
        lm.weight(1)[0, 0] += 1
    second_moment(lm, [1], SENTENCES, cache_dir=tmp_path)
    assert runs
    assert not list(tmp_path.glob("*.part"))


def test_broken_cache_file_is_named(tmp_path, tiny_lm):
    lm = tiny_lm()
    second_moment(lm, [0], SENTENCES, cache_dir=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(b"half a file")
    with pytest.raises(DataError, match=f"{file.name}.*delete"):
        second_moment(lm, [0], SENTENCES, cache_dir=tmp_path)


def test_save_and_load(tmp_path):
    C = torch.eye(3, dtype=torch.float64) * (1 + 1e-13)
    path = Covariance(C, 7, {"corpus": "x", "list": [1]}).save(tmp_path / "deep" / "c.safetensors")
    back = Covariance.load(path)
    assert torch.equal(back.C, C) and back.n == 7 and back.provenance == {"corpus": "x", "list": [1]}
    save_file({"C": C}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not a second moment"):
        Covariance.load(tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"absent\.safetensors"):
        Covariance.load(tmp_path / "absent.safetensors")


def test_from_array_copies():
    array = np.eye(2, dtype=np.float32)
    moment = Covariance.from_array(array, 5)
    array[0, 0] = 9
    assert moment.C.dtype == torch.float64 and moment.C[0, 0] == 1 and moment.n == 5


@pytest.mark.parametrize(
    ("C", "message"),
    [
        (torch.ones(2, 3), "square"),
        (torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), "NaN"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "symmetric"),
    ],
)
def test_bad_matrices_are_refused(C, message):
    with pytest.raises(NumericsError, match=message):
        Covariance(C, 1)


def test_bad_input_is_refused(tiny_lm):
    lm = tiny_lm()
    with pytest.raises(DataError, match="no texts"):
        second_moment(lm, [0], [])
    with pytest.raises(ConfigError, match="no layers"):
        second_moment(lm, [], SENTENCES)
    with pytest.raises(ModelError, match="layers 0 to 1"):
        second_moment(lm, [5], SENTENCES)
    with pytest.raises(ConfigError, match="tokens_per_batch"):
        second_moment(lm, [0], SENTENCES, tokens_per_batch=0)
    with pytest.raises(ConfigError, match="float32 or float64"):
        second_moment(lm, [0], SENTENCES, dtype=torch.bfloat16)
    with pytest.raises(RequestError, match="no tokens"):
        second_moment(lm, [0], ["fine", ""])
    with torch.no_grad():
        lm.parameter("transformer.wte.weight")[:] = torch.inf
    with pytest.raises(NumericsError, match="NaN"):
        second_moment(lm, [0], SENTENCES)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_golden_covariances(golden_dir, golden_lm, kind):
    data = json.loads((golden_dir / "models" / "data.json").read_text())
    recorded = np.load(golden_dir / "models" / kind / "cov.npz")
    found = second_moment(golden_lm(kind), range(4), data["train_sentences"] + data["filler_sentences"])
    for layer, moment in found.items():
        assert moment.n == recorded[f"n_{layer}"]
        assert np.abs(moment.C.numpy() - recorded[f"cov_{layer}"]).max() < 5e-7
        assert Covariance.from_array(recorded[f"cov_{layer}"]).d == moment.d
