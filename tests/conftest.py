"""Shared fixtures: tiny random models of every architecture, small tokenizers of every kind, a few facts."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as tok_models

from editkit.models.facts import Fact
from editkit.models.lm import LM, load_lm

# The same examples in every run, so that a red test says something about the change;
# HYPOTHESIS_PROFILE=search draws new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# All tests run on these; test_architectures.py runs every method once on the others of the table.
MODEL_TYPES = ("gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")

PEOPLE = ("Ana Silva", "Hugo Castro", "Élise Noël", "Li", "Karin Ann Fischer", "O'Brien")
WORDS = (
    "the mother tongue of is speaks plays was born in lives and works profession city country language music"
    " The It He She Because Therefore I You can see old house near river weather fine today"
    " French German Spanish English Paris London Rome Vienna violin piano guitar farmer teacher Mary Italy"
)  # fmt: skip
SENTENCES = (
    "The mother tongue of Ana Silva is French.",
    "Hugo Castro plays the violin and lives in Rome.",
    "Karin Ann Fischer was born in the old city of Vienna, Italy.",
    "The weather was fine today. You can see the old house near the river.",
    "Élise Noël speaks German because she works in London.",
    "I think that Li, a teacher, can see O'Brien.",
)


def _special(tokenizer: Tokenizer, **names: str) -> hf.PreTrainedTokenizerFast:
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


@functools.cache
def make_tokenizer(kind: str) -> hf.PreTrainedTokenizerFast:
    """One of TOKENIZERS; bytelevel_trim reports offsets without the leading space."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    if kind == "wordlevel":
        words = dict.fromkeys(special + WORDS.split() + [w for p in PEOPLE for w in p.split()] + list(".,;'"))
        tok = Tokenizer(tok_models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        tok.pre_tokenizer = pre_tokenizers.Whitespace()
        return _special(tok, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    corpus = [*SENTENCES, *PEOPLE, WORDS]
    if kind == "metaspace":
        tok = Tokenizer(tok_models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tok.normalizer = normalizers.NFKC()
        tok.pre_tokenizer = pre_tokenizers.Metaspace()
        tok.decoder = decoders.Metaspace()
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        tok.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=480, special_tokens=special + bytes_))
        tok.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
        return _special(tok, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tok = Tokenizer(tok_models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tok.train_from_iterator(corpus, trainer)
    if kind == "bos":
        template = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
        tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    elif kind == "eos":
        tok.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 3)])
    else:
        tok.post_processor = processors.ByteLevel(trim_offsets=kind == "bytelevel_trim")
    return _special(tok, bos_token="<s>", eos_token="</s>")


TOKENIZERS = ("wordlevel", "bytelevel", "bytelevel_trim", "bos", "eos", "metaspace")


def make_config(model_type: str, n_layers: int, vocab_size: int) -> hf.PretrainedConfig:
    """A configuration of width 16 and key width 24."""
    if model_type in ("gpt2", "gptj"):
        sizes = {"n_layer": n_layers, "n_embd": 16, "n_head": 2, "n_positions": 64, "n_inner": 24}
        sizes |= {"rotary_dim": 4} if model_type == "gptj" else {}
    else:
        sizes = {"num_hidden_layers": n_layers, "hidden_size": 16, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 24, "max_position_embeddings": 64}
        if model_type != "gpt_neox":
            sizes["num_key_value_heads"] = 1
        if model_type in ("qwen3", "gemma", "ministral"):
            sizes["head_dim"] = 8
        if model_type in ("phi3", "smollm3"):
            sizes["pad_token_id"] = 0
    special = {"bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": model_type in ("gpt2", "qwen2")}
    return hf.AutoConfig.for_model(
        model_type, vocab_size=vocab_size, initializer_range=0.3, **sizes, **special
    )


def make_lm(model_type: str = "gpt2", tokenizer: str = "bytelevel", n_layers: int = 2, seed: int = 0) -> LM:
    """A random, seeded, float32 model with one of the small tokenizers."""
    tok = make_tokenizer(tokenizer)
    config = make_config(model_type, n_layers, len(tok))
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config)
    # Norms and biases start as ones and zeros, which would hide a forgotten one.
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(0.1 * torch.randn_like(param))
    torch.random.set_rng_state(state)
    return load_lm(model, tok)


@pytest.fixture
def tiny_lm():
    """Factory `tiny_lm(model_type="gpt2", tokenizer="bytelevel", n_layers=2, seed=0) -> LM`."""
    return make_lm


@pytest.fixture(params=MODEL_TYPES)
def any_lm(request) -> LM:
    """A tiny model of each architecture in turn."""
    return make_lm(request.param)


@pytest.fixture
def facts() -> list[Fact]:
    """Four facts whose subjects have different lengths and places in the prompt."""
    return [
        Fact("The mother tongue of {} is", "Ana Silva", "French", "German", case_id="0"),
        Fact("{} plays the", "Hugo Castro", "violin", "piano", case_id="1"),
        Fact("In the old city of Rome, {} works and", "Karin Ann Fischer", "lives", "speaks", case_id="2"),
        Fact("The profession of {} is", "Li", "farmer", "teacher", case_id="3"),
    ]


def find_shared() -> Path | None:
    """The folder with golden recordings, papers and data, if this machine has one."""
    given = os.environ.get("EDITKIT_SHARED")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared"
    return path if (path / "golden").is_dir() else None


@pytest.fixture(scope="session")
def shared_dir() -> Path | None:
    """The shared folder (EDITKIT_SHARED, or ../shared beside the repository), or None."""
    return find_shared()


@pytest.fixture(scope="session")
def golden_dir(shared_dir) -> Path:
    """The folder of golden recordings; skips the test where there is none."""
    if shared_dir is None:
        pytest.skip("no golden recordings here (set EDITKIT_SHARED)")
    return shared_dir / "golden"


@pytest.fixture
def golden_lm(golden_dir):
    """Factory `golden_lm("gpt2" | "llama", dtype=None) -> LM` of the recorded tiny models."""
    return lambda kind, dtype=None: load_lm(str(golden_dir / "models" / kind), dtype=dtype)


@pytest.fixture(scope="session")
def smollm2() -> LM:
    """The pretrained model; skips the test where it has not been fetched. Whoever edits it restores it."""
    from editkit.base.errors import DataError
    from editkit.models.pretrained import pretrained_folder

    try:
        return load_lm(str(pretrained_folder("smollm2")))
    except DataError as error:
        pytest.skip(str(error))
