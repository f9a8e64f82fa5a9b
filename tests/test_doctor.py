"""editkit doctor: findings from configuration and tokenizer alone, and what it refuses."""

import time

import pytest
import torch
import transformers as hf
from conftest import MODEL_TYPES, make_config, make_lm, make_tokenizer

from editkit.base.errors import ConfigError, ModelError
from editkit.cli import main
from editkit.methods.doctor import examine
from editkit.models.capacity import memory_plan
from editkit.models.lm import load_lm
from editkit.models.preflight import (
    GIB,
    check_fits,
    empty_model,
    free_memory,
    read_config,
    tiny_model,
    weight_bytes,
)  # fmt: skip

HUGE = {"host": 10**15}


def folder(path, config, tokenizer="bytelevel"):
    """A model folder with configuration and tokenizer, and no weights."""
    config.save_pretrained(path)
    make_tokenizer(tokenizer).save_pretrained(path)
    return str(path)


def llama3_8b(**changes):
    sizes = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    }  # fmt: skip
    return hf.AutoConfig.for_model("llama", **sizes | changes)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_class_of_the_table_is_ready(tmp_path, model_type):
    path = folder(tmp_path, make_config(model_type, 4, len(make_tokenizer("bytelevel"))))
    tokenizer = make_tokenizer("bytelevel")  # AutoTokenizer would make a Qwen2Tokenizer for a qwen2 folder
    found = examine(path, layers=[1, 2], memory=HUGE, tokenizer=tokenizer)
    assert [f for f in found if f.status == "change"] == [], "\n".join(map(str, found))
    said = {f.check: f.text for f in found}
    assert "4 layers, width 16, MLP 24" in said["model"]
    assert ("in x out" in said["modules"]) == (model_type == "gpt2")
    assert said["outputs"].startswith("block tuple" if model_type == "gptj" else "block tensor")
    assert "[1, 2], as given" in said["layers"] and "peak" in said["memory"]


@pytest.mark.parametrize("kind", ["wordlevel", "bos", "eos", "metaspace"])
def test_tokenizers_of_every_kind(tmp_path, kind):
    path = folder(tmp_path, make_config("llama", 2, len(make_tokenizer(kind))), kind)
    said = {f.check: f for f in examine(path, layers=[0], memory=HUGE)}
    assert (said["BOS"].status == "ok") == (kind in ("bos", "metaspace"))
    assert ("EOS" in said) == (kind == "eos")
    assert said["lookup"].status == "ok" and said["padding"].status == "ok"


def test_seven_billion_parameters_from_the_configuration_alone(tmp_path):
    path = folder(tmp_path, llama3_8b())
    start = time.perf_counter()
    found = examine(path, memory={"host": 64 * GIB, "accelerator": 80 * GIB})
    said = {f.check: f for f in found}
    assert time.perf_counter() - start < 60
    assert "8.03 billion" in said["model"].text
    assert "[4, 5, 6, 7, 8] (published) of preset Llama-3-8B-Instruct" in said["layers"].text
    assert (
        said["dtype"].text.startswith("forward in bfloat16; float32 masters of 5")
        and said["memory"].status == "ok"
    )
    half = examine(path, memory={"host": 64 * GIB, "accelerator": 24 * GIB}, dtype=torch.bfloat16)
    memory = next(f for f in half if f.check == "memory")
    assert memory.status == "change" and "missing" in memory.text
    assert "lower z_tokens_per_batch" in memory.fix and "second moments on the host" in memory.fix


def test_weights_that_do_not_fit_say_what_would(tmp_path):
    path = folder(tmp_path, llama3_8b())
    with pytest.raises(ModelError) as caught:
        examine(path, memory={"host": 20 * GIB}, dtype=torch.float32)
    said = str(caught.value)
    assert (
        "29.9 GiB in float32" in said and "9.9 GiB are missing" in said and "in bfloat16 it would fit" in said
    )
    with pytest.raises(ModelError, match=r"up to 5\.4 billion parameters in bfloat16"):
        examine(path, memory={"host": 10 * GIB}, dtype=torch.bfloat16)


def test_check_fits_adds_up_the_places():
    check_fits(3 * GIB, torch.bfloat16, "m", {"host": 2 * GIB, "a:0": GIB})
    with pytest.raises(ModelError, match=r"a:0 1\.0 GiB.*1\.0 GiB are missing"):
        check_fits(4 * GIB, torch.bfloat16, "m", {"host": 2 * GIB, "a:0": GIB})
    assert free_memory()["host"] > 0


def test_memory_plan_counts_matrices(tmp_path):
    lm = make_lm("llama", n_layers=4)
    d, m = lm.d_key, lm.d_model
    plan = memory_plan(lm, [1, 2], torch.bfloat16, "alphaedit")
    assert plan.covariance == 2 * d * d * 8 and plan.history == 3 * plan.covariance and plan.masters == 2 * d * m * 4
    assert plan.weights == sum(p.numel() for p in lm.model.parameters()) * 2
    plain = memory_plan(lm, [1, 2], torch.float32)
    assert plain.masters == plain.history == 0
    lower = memory_plan(lm, [0, 1], torch.float32)
    assert lower.targets > plain.targets  # more blocks above the edited one


def test_models_built_from_the_configuration_match_a_real_one(tmp_path):
    config = make_config("gptj", 3, 50)
    real = hf.AutoModelForCausalLM.from_config(config)
    empty = empty_model(config)
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    assert all(p.is_meta for p in empty.parameters())
    assert weight_bytes(empty, torch.bfloat16) == 2 * sum(p.numel() for p in real.parameters())
    before = torch.random.get_rng_state()
    small = tiny_model(config)
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(small.transformer.h) == 2 and config.n_layer == 3 and small.config.vocab_size == 50


BROKEN = {
    "is_encoder_decoder": (
        hf.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2),
        "encoder-decoder",
    ),
    "quantised": (llama3_8b(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised .gptq."),
    "encoder": (hf.BertConfig(hidden_size=16), "it is an encoder"),
    "unknown": (hf.MptConfig(d_model=8, n_layers=1, n_heads=2), "no row for model type 'mpt'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_edited_is_refused_before_anything_is_loaded(tmp_path, case):
    config, words = BROKEN[case]
    path = folder(tmp_path, config)
    with pytest.raises(ModelError, match=words):
        examine(path, memory=HUGE)
    with pytest.raises(ModelError, match=words):
        load_lm(path)


def test_a_model_that_does_not_exist(tmp_path):
    with pytest.raises(ModelError, match="no name on the Hub, nor a folder here"):
        read_config(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"folder without config\.json"):
        examine(str(tmp_path / "empty"), memory=HUGE)
    with pytest.raises(ConfigError, match="unknown method 'memitt'"):
        examine(str(tmp_path), method="memitt", memory=HUGE)


def test_a_tokenizer_of_another_model_is_found_out(tmp_path):
    path = folder(tmp_path, make_config("llama", 2, 30))
    said = {f.check: f for f in examine(path, layers=[0], memory=HUGE)}
    assert said["vocabulary"].status == "change" and "the embedding 30" in said["vocabulary"].text


def test_command_line(tmp_path, capsys):
    path = folder(tmp_path, make_config("llama", 3, len(make_tokenizer("bytelevel"))))
    assert main(["doctor", path, "--layers", "1", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "ready to edit" in out and "forward in bfloat16" in out
    assert main(["doctor", path]) == 1  # no preset of this shape
    assert "causal tracing" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "nothing")]) == 2
    assert "Check the name or path" in capsys.readouterr().err
    assert main(["doctor", path, "--layers", "9"]) == 2
