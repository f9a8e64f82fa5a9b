"""LM: the architecture table against real classes, weights, head, padding, fingerprint, loading."""

import dataclasses

import pytest
import torch
import transformers as hf
from conftest import MODEL_TYPES, PEOPLE, make_config, make_lm, make_tokenizer
from torch import nn
from transformers.pytorch_utils import Conv1D

from editkit.base.errors import ModelError, NumericsError, RequestError
from editkit.models.architectures import ARCHITECTURES
from editkit.models.hooks import hidden, trace
from editkit.models.lm import LM, load_lm

TEXTS = ["Ana Silva is", "The mother tongue of Karin Ann Fischer is the old language", "Li"]


def test_table_lists_the_promised_architectures():
    new = {"ministral", "gemma", "olmo", "smollm3", "stablelm", "phi", "phi3", "starcoder2"}
    assert set(ARCHITECTURES) == {*MODEL_TYPES, *new}


def test_sizes_and_names(any_lm):
    lm = any_lm
    assert (lm.n_layers, lm.d_model, lm.d_key) == (2, 16, 24)
    modules = dict(lm.model.named_modules())
    for name in (lm.block_name(1), lm.mlp_name(1), lm.down_name(1), lm.attn_name(1), lm.embed_name):
        assert name in modules
    assert lm.weight_name(1) in dict(lm.model.named_parameters())
    assert lm.parameter(lm.weight_name(1)) is lm.weight(1)
    block = modules[lm.block_name(0)]
    for path in (*lm.spec.up, lm.spec.attn_out):
        assert isinstance(block.get_submodule(path), nn.Linear | Conv1D)


def test_row_orientation_and_block_output_are_true(any_lm):
    lm, seen = any_lm, {}
    block = lm.model.get_submodule(lm.block_name(0))
    handle = block.register_forward_hook(lambda m, args, out: seen.update(out=out))
    lm.logits(lm.encode(TEXTS))
    handle.remove()
    assert isinstance(seen["out"], torch.Tensor) == (lm.spec.block_output == "tensor")
    assert isinstance(seen["out"], tuple) == (lm.spec.block_output == "tuple")
    assert hidden(seen["out"]).shape[0] == len(TEXTS)
    down = lm.model.get_submodule(lm.down_name(0))
    assert isinstance(down, Conv1D if lm.spec.orientation == "conv1d" else nn.Linear)


def test_down_projection_maps_keys_to_mlp_output(any_lm):
    """W k (+ bias) is what the MLP returns, and up projections feed the key: the memory view of ROME."""
    lm = any_lm
    with torch.no_grad(), trace(lm.model, [lm.down_name(1), lm.mlp_name(1)], inputs=True) as seen:
        lm.logits(lm.encode(TEXTS))
    bias = getattr(lm.model.get_submodule(lm.down_name(1)), "bias", None)
    value = seen.input[lm.down_name(1)].double() @ lm.get_matrix(1).T
    value = value if bias is None else value + bias.double()
    assert torch.allclose(value, seen.output[lm.mlp_name(1)].double(), atol=1e-5)


def test_block_output_is_the_residual_sum(any_lm):
    """Block output = input + attention + MLP in every architecture, sequential or parallel."""
    lm = any_lm
    names = [lm.block_name(0), lm.block_name(1), lm.attn_name(1), lm.mlp_name(1)]
    with torch.no_grad(), trace(lm.model, names) as seen:
        lm.logits(lm.encode(TEXTS))
    total = sum(seen.output[n] for n in (lm.block_name(0), lm.attn_name(1), lm.mlp_name(1)))
    assert torch.allclose(total, seen.output[lm.block_name(1)], atol=1e-5)


def test_head_of_last_block_gives_the_logits(any_lm):
    lm = any_lm
    with torch.no_grad(), trace(lm.model, [lm.block_name(1)]) as seen:
        logits = lm.logits(lm.encode(TEXTS))
    assert torch.equal(lm.head(seen.output[lm.block_name(1)]), logits)
    assert not torch.allclose(seen.output[lm.block_name(1)] @ lm.embeddings().T, logits, atol=1e-2)


def test_left_and_right_padding_give_equal_logits(any_lm):
    lm = any_lm
    with torch.no_grad():
        right, left = lm.encode(TEXTS), lm.encode(TEXTS, "left")
        at_right, at_left = lm.logits(right), lm.logits(left)
        for i, text in enumerate(TEXTS):
            alone = lm.logits(lm.encode([text]))[0]
            n = len(alone)
            assert torch.allclose(at_right[i, :n], alone, atol=1e-5)
            assert torch.allclose(at_left[i, -n:], alone, atol=1e-5)
    assert right.last.tolist() == (right.lengths - 1).tolist()
    assert set(left.last.tolist()) == {left.input_ids.shape[1] - 1}


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoding_take_and_select(tiny_lm, side):
    encoding = tiny_lm().encode(TEXTS, side)
    part, cut = encoding.take([0, 2])
    longest = int(encoding.lengths[[0, 2]].max())
    assert part.input_ids.shape == (2, longest) and part.texts == [TEXTS[0], TEXTS[2]]
    assert cut == (encoding.input_ids.shape[1] - longest if side == "left" else 0)
    assert torch.equal(part.lengths, encoding.lengths[[0, 2]])
    assert torch.equal(part.last + cut, encoding.last[[0, 2]])
    assert torch.equal(part.offsets, encoding.offsets[[0, 2]][:, cut : cut + longest])
    again = encoding.select(torch.tensor([1, 1, 0]))
    assert again.texts == [TEXTS[1], TEXTS[1], TEXTS[0]]
    assert torch.equal(again.input_ids, encoding.input_ids[[1, 1, 0]])


def test_matrix_round_trip(any_lm):
    lm = any_lm
    before = lm.get_matrix(1)
    assert before.shape == (16, 24) and before.dtype == torch.float64
    new = torch.randn(16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lm.set_matrix(1, new)
    assert torch.equal(lm.get_matrix(1), new.float().double())
    before.zero_()  # a copy: the model must not feel it
    assert torch.equal(lm.get_matrix(1), new.float().double())
    stored = lm.weight(1)
    expected = (24, 16) if lm.spec.orientation == "conv1d" else (16, 24)
    assert tuple(stored.shape) == expected


def test_set_matrix_refuses_bad_values(tiny_lm):
    lm = tiny_lm()
    W = lm.get_matrix(0)
    with pytest.raises(NumericsError, match=r"\(m, d\) = \(16, 24\)"):
        lm.set_matrix(0, W.T)
    W[0, 0] = torch.nan
    before = lm.get_matrix(0)
    with pytest.raises(NumericsError, match="NaN"):
        lm.set_matrix(0, W)
    assert torch.equal(lm.get_matrix(0), before)


@pytest.mark.parametrize("layer", [-1, 2, "0", 0.0, True])
def test_unknown_layer_is_refused(tiny_lm, layer):
    with pytest.raises(ModelError, match="layers 0 to 1"):
        tiny_lm().block_name(layer)


def test_unknown_parameter_is_refused(tiny_lm):
    with pytest.raises(ModelError, match="did you mean"):
        tiny_lm().parameter("transformer.h.0.mlp.c_pro.weight")
    with pytest.raises(ModelError, match="no parameter"):
        tiny_lm().parameter("transformer.h.0.mlp.c_proj.wait")


def test_fingerprint_sees_every_weight_and_every_kind_of_write(any_lm):
    lm = any_lm
    first = lm.fingerprint()
    assert first == lm.fingerprint() == make_lm(lm.model.config.model_type).fingerprint()
    assert first != make_lm(lm.model.config.model_type, seed=1).fingerprint()
    for _, param in lm.model.named_parameters():
        flat = param.data.view(-1)
        old = flat[-1].clone()
        flat[-1] = old * 1.0001 + 1e-6  # through .data: autograd's version counter does not move
        assert lm.fingerprint() != first
        flat[-1] = old
    assert lm.fingerprint() == first
    assert LM(lm.model.bfloat16(), lm.tokenizer).fingerprint() != first


def test_fingerprint_survives_saving(tiny_lm, tmp_path):
    lm = tiny_lm("qwen2")
    lm.model.save_pretrained(tmp_path / "m")
    lm.tokenizer.save_pretrained(tmp_path / "m")
    again = load_lm(str(tmp_path / "m"))
    assert again.fingerprint() == lm.fingerprint()
    assert again.name == "m"  # no machine path
    assert again.encode(TEXTS).input_ids.tolist() == lm.encode(TEXTS).input_ids.tolist()
    half = load_lm(str(tmp_path / "m"), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.get_matrix(0).dtype == torch.float64


def test_bfloat16_forward_and_single_cast(tiny_lm):
    lm = tiny_lm("llama")
    model = lm.model.bfloat16()
    half = LM(model, lm.tokenizer)
    W = half.get_matrix(0) + 1e-3
    half.set_matrix(0, W)
    assert torch.equal(half.get_matrix(0), W.to(torch.bfloat16).double())
    assert half.head(torch.randn(3, 16)).dtype == torch.bfloat16


def test_tokenizer_of_the_caller_stays_untouched():
    tok = make_tokenizer("bytelevel")
    assert tok.pad_token is None
    side = tok.padding_side
    lm = make_lm(tokenizer="bytelevel")
    lm.encode(TEXTS, "left")
    assert tok.pad_token is None and tok.padding_side == side
    assert lm.tokenizer.pad_token == "</s>"


def test_pad_token_falls_back_and_fails_clearly(tiny_lm):
    lm = tiny_lm(tokenizer="wordlevel")
    bare = hf.PreTrainedTokenizerFast(tokenizer_object=lm.tokenizer.backend_tokenizer, unk_token="<unk>")
    assert LM(lm.model, bare).tokenizer.pad_token == "<unk>"
    none = hf.PreTrainedTokenizerFast(tokenizer_object=lm.tokenizer.backend_tokenizer)
    with pytest.raises(ModelError, match=r"set tokenizer\.pad_token"):
        LM(lm.model, none)


def test_encode_refuses_bad_texts(tiny_lm):
    lm = tiny_lm()
    for texts, message in [([], "empty"), ("one", "wrap it in a list"), (["ok", ""], "no tokens")]:
        with pytest.raises(RequestError, match=message):
            lm.encode(texts)
    with pytest.raises(RequestError, match="allows 64"):
        lm.encode(["Ana " * 100])
    assert lm.encode(["Ana " * 100], max_length=20).input_ids.shape == (1, 20)
    with pytest.raises(RequestError, match="padding_side"):
        lm.encode(TEXTS, "middle")


def test_special_tokens_are_optional(tiny_lm):
    lm = tiny_lm(tokenizer="bos")
    with_bos = lm.encode(TEXTS, "left")
    without = lm.encode(TEXTS, "left", add_special_tokens=False)
    assert (with_bos.lengths == without.lengths + 1).all()
    assert with_bos.input_ids[torch.arange(3), with_bos.first].tolist() == [2, 2, 2]
    assert with_bos.position_ids[torch.arange(3), with_bos.first].tolist() == [0, 0, 0]


def test_unknown_architecture_names_the_table(tiny_lm):
    config = hf.OPTConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        ffn_dim=24,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    )
    model = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"opt.*gpt2.*qwen3.*ArchSpec"):
        load_lm(model, make_tokenizer("wordlevel"))
    row = dataclasses.replace(
        ARCHITECTURES["llama"], model_types=("opt",), blocks="model.decoder.layers", mlp="fc2", down="fc2",
        up=("fc1",), attn_out="self_attn.out_proj", norm="model.decoder.final_layer_norm",
        embed="model.decoder.embed_tokens",
    )  # fmt: skip
    assert load_lm(model, make_tokenizer("wordlevel"), spec=row).d_key == 24


def test_wrong_row_is_refused(tiny_lm):
    lm = tiny_lm("llama")
    rows = {
        "blocks": "model.norm",
        "down": "mlp.up_proj",
        "norm": "model.final_norm",
        "orientation": "conv1d",
        "attn_out": "attn.dense",
    }
    for field, value in rows.items():
        with pytest.raises(ModelError):
            LM(lm.model, lm.tokenizer, dataclasses.replace(lm.spec, **{field: value}))


def test_encoder_decoder_float16_and_quantised_are_refused(tiny_lm):
    tok = make_tokenizer("wordlevel")
    t5 = hf.T5Config(vocab_size=70, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="encoder-decoder"):
        load_lm(hf.T5ForConditionalGeneration(t5), tok)
    with pytest.raises(ModelError, match="bfloat16"):
        load_lm(tiny_lm().model, tok, dtype=torch.float16)
    lm = tiny_lm("llama")
    lm.model.config.quantization_config = {"quant_method": "any"}
    with pytest.raises(ModelError, match="quantised"):
        LM(lm.model, lm.tokenizer)


def test_load_errors_name_the_fix(tmp_path):
    with pytest.raises(ModelError, match="Check the name or path"):
        load_lm(str(tmp_path))
    model = hf.AutoModelForCausalLM.from_config(make_config("gpt2", 1, 70))
    with pytest.raises(ModelError, match="pass tokenizer"):
        load_lm(model)


def test_loading_does_not_touch_global_random_state(tiny_lm):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    lm = tiny_lm()
    lm.logits(lm.encode(list(PEOPLE)))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_golden_models_load(golden_lm, kind):
    lm = golden_lm(kind)
    assert (lm.n_layers, lm.d_model, lm.d_key) == (4, 32, {"gpt2": 128, "llama": 88}[kind])
    assert golden_lm(kind, torch.float64).dtype == torch.float64
