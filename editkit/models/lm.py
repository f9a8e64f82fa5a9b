"""Causal language models behind one face: the class `LM` and `load_lm`.

To use an architecture that is not in the table, write an `ArchSpec` and pass it to `load_lm(..., spec=row)`;
`LM` checks the row against the model at once.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..base.errors import EditkitError, ModelError, NumericsError, RequestError
from .architectures import ARCHITECTURES, ArchSpec
from .batching import Encoding, PaddingSide, padded, token_rows
from .gguf import is_gguf, read_gguf
from .hooks import check_not_compiled, hidden, submodule
from .identity import check_plain, check_resident, fingerprint_of, hash_of
from .preflight import check_config, check_source

__all__ = ["ARCHITECTURES", "LM", "ArchSpec", "Encoding", "hidden", "load_lm"]


class LM:
    """A causal language model, its tokenizer and its row of the architecture table.

    The model is used in eval mode and never changed except by `set_matrix` (and by what editors do to
    `parameter(name)`). The tokenizer is a private copy, so settings of the caller's object stay as they are.

    Raises ModelError for encoder-decoder, quantised and float16 models, or when the spec does not fit.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer, spec: ArchSpec | None = None, name: str = ""
    ) -> None:
        check_plain(model)
        self.spec = spec if spec is not None else _find_spec(model)
        self.model = model.eval()
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.truncation_side = "right"
        self.name = _short_name(name or getattr(model.config, "_name_or_path", "")) or type(model).__name__
        self._unedited: dict[str, str] = {}
        self._hashes: dict[str, tuple[tuple, str]] = {}
        self._check()
        self._set_pad_token()

    def __repr__(self) -> str:
        return (
            f"LM({self.name!r}, {self.model.config.model_type}, {self.n_layers} layers, "
            f"d_model {self.d_model}, d_key {self.d_key}, {str(self.dtype).removeprefix('torch.')})"
        )

    # --- sizes and names ------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(submodule(self.model, self.spec.blocks))

    @property
    def d_model(self) -> int:
        """m, width of the residual stream and of the values."""
        return self.weight_shape(0)[0]

    @property
    def d_key(self) -> int:
        """d, width of the MLP's hidden layer, i.e. of the keys."""
        return self.weight_shape(0)[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the edited matrices are stored."""
        return self.weight(0).dtype

    @property
    def max_tokens(self) -> int | None:
        """Longest sequence the position embedding allows, or None if the config does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def device(self, layer: int | None = None) -> torch.device:
        """Device of a block's down projection; without a layer that of the embedding (for inputs)."""
        if layer is None:
            return submodule(self.model, self.spec.embed).weight.device
        return self.weight(layer).device

    def check_layer(self, layer: int) -> int:
        """The layer index, if it exists; raises ModelError otherwise (negative indices are refused)."""
        if not isinstance(layer, Integral) or isinstance(layer, bool) or not 0 <= layer < self.n_layers:
            raise ModelError(
                f"layer {layer!r} does not exist: {self.name} has layers 0 to {self.n_layers - 1}"
            )
        return int(layer)

    def block_name(self, layer: int) -> str:
        """Module path of a block; its output is the hidden state h^l."""
        return f"{self.spec.blocks}.{self.check_layer(layer)}"

    def mlp_name(self, layer: int) -> str:
        """Module path of a block's MLP; its output is the value m^l."""
        return f"{self.block_name(layer)}.{self.spec.mlp}"

    def down_name(self, layer: int) -> str:
        """Module path of the down projection; its input is the key k^l."""
        return f"{self.block_name(layer)}.{self.spec.down}"

    def attn_name(self, layer: int) -> str:
        """Module path of a block's attention."""
        return f"{self.block_name(layer)}.{self.spec.attn}"

    @property
    def embed_name(self) -> str:
        """Module path of the token embedding."""
        return self.spec.embed

    # --- weights --------------------------------------------------------------------------------------------

    def weight_name(self, layer: int) -> str:
        """Parameter name of the down projection's weight."""
        return f"{self.down_name(layer)}.weight"

    def weight(self, layer: int) -> nn.Parameter:
        """The down projection's weight in the model's own orientation."""
        return submodule(self.model, self.down_name(layer)).weight

    def embeddings(self) -> Tensor:
        """The token embedding matrix, (vocabulary, m), detached."""
        return submodule(self.model, self.spec.embed).weight.detach()

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter by name; raises ModelError if there is none, or if it is offloaded."""
        path, _, leaf = name.rpartition(".")
        value = getattr(submodule(self.model, path), leaf, None)
        if not isinstance(value, nn.Parameter):
            raise ModelError(
                f"{self.name} has no parameter {name!r}; see model.named_parameters() for the names"
            )
        check_resident(name, value)
        return value

    def to_matrix(self, weight: Tensor) -> Tensor:
        """From the model's weight orientation to (m, d), or back: a transposition for Conv1D models only."""
        return weight.T if self.spec.orientation == "conv1d" else weight

    def get_matrix(self, layer: int) -> Tensor:
        """W of shape (m, d), a float64 copy of the down projection."""
        return self.to_matrix(self.weight(layer).detach()).to(torch.float64, copy=True).contiguous()

    def set_matrix(self, layer: int, W: Tensor) -> None:
        """Write W (m, d) into the model, cast once to the stored dtype.

        Raises NumericsError for a wrong shape, NaN or Inf, also where the stored dtype cannot hold a value.
        """
        if tuple(W.shape) != self.weight_shape(layer):
            raise NumericsError(
                f"layer {layer}: expected a matrix (m, d) = {self.weight_shape(layer)}, got "
                f"{tuple(W.shape)}; editkit's convention is out x in for every architecture"
            )
        self.write({self.weight_name(layer): self.to_matrix(W)})

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Write parameters by name, each cast once to its stored dtype; all of them or none.

        Raises NumericsError for NaN or Inf after the cast, ModelError for a parameter that is not in memory.
        """
        cast = {}
        for name, value in values.items():
            weight = self.parameter(name)
            cast[name] = value.detach().to(weight)
            if not torch.isfinite(cast[name]).all():
                raise NumericsError(
                    f"{name}: the new weight has NaN or Inf in {str(weight.dtype).removeprefix('torch.')}; check the "
                    "update before writing it"
                )
        with torch.no_grad():
            for name, value in cast.items():
                self.parameter(name).copy_(value)

    def remember(self, names: Collection[str]) -> None:
        """Keep hashes of parameters before their first edit, so that `edited` can tell whether they carry one."""
        for name in names:
            if name not in self._unedited:
                self._unedited[name] = hash_of(self.parameter(name))

    def edited(self) -> list[str]:
        """Parameters that differ from what they were before their first edit through this object."""
        return [name for name, value in self._unedited.items() if hash_of(self.parameter(name)) != value]

    def fingerprint(self, exclude: Collection[str] = ()) -> str:
        """sha256 (hex) of the function the model computes, but for the parameters in `exclude`.

        It sees the config values that compute, the names, shapes, dtypes and values of parameters and buffers,
        and the state of adapter layers. Buffers that a checkpoint does not hold follow from the config. The
        values are read on every call (`identity` says cheaply whether a hash still holds), so that it can never be
        that of an earlier state of the model. The same weights in another dtype are another model.

        Raises ModelError in training mode, whose passes are random, and for weights that are not in memory.
        """
        self.check_ready()
        return fingerprint_of(self.model, self._hashes, exclude)

    def check_ready(self) -> None:
        """Raise ModelError in training mode, where dropout makes every pass another one, and for a model that was
        compiled since, which ignores hooks.
        """
        check_not_compiled(self.model)
        if self.model.training:  # the adapter that the editor "lora" trains inside may be in this mode
            raise ModelError(f"{self.name} is in training mode, where dropout is random; call lm.model.eval() first")

    # --- text and forward passes ----------------------------------------------------------------------------

    def encode(
        self,
        texts: Sequence[str],
        padding_side: Literal["left", "right"] = "right",
        *,
        add_special_tokens: bool = True,
        max_length: int | None = None,
    ) -> Encoding:
        """Tokenize and pad a batch, on the device of the embedding.

        Special tokens as in `batching.token_rows`. max_length truncates on the right; without it nothing is ever
        cut.
        Raises RequestError for an empty batch, a text without tokens, or one longer than the model allows.
        """
        if padding_side not in ("left", "right"):
            raise RequestError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        if isinstance(texts, str):
            raise RequestError(
                f"expected a list of texts, got the single string {texts!r}; wrap it in a list"
            )
        if not texts:
            raise RequestError("no texts to encode: the list is empty")
        rows, spans = token_rows(
            self.tokenizer, texts, add_special_tokens=add_special_tokens, max_length=max_length
        )
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise RequestError(f"the text {text!r} has no tokens; give a non-empty text")
            if self.max_tokens is not None and len(row) > self.max_tokens:
                raise RequestError(
                    f"a text has {len(row)} tokens, {self.name} allows {self.max_tokens}: {text[:80]!r}..."
                )
        tensors = self.pad(rows, padding_side)
        offsets = None
        if spans is not None:
            text = tensors["attention_mask"].bool().cpu()
            offsets = torch.zeros(*text.shape, 2, dtype=torch.long)
            offsets[text] = torch.tensor([x for row in spans for x in row])
        return Encoding(tensors, texts, offsets, padding_side).to(self.device())

    def pad(self, rows: Sequence[Sequence[int]], side: PaddingSide) -> dict[str, Tensor]:
        """input_ids, attention_mask, position_ids (`batching.padded`) on the device of the embedding.

        Raises ModelError in training mode, and for a compiled model.
        """
        self.check_ready()
        return {k: v.to(self.device()) for k, v in padded(rows, self.tokenizer.pad_token_id, side).items()}

    def forward(self, encoding: Encoding, **kwargs):
        """The model's output for a batch, without KV cache by default; gradients as the caller set them."""
        return self.model(**encoding, **{"use_cache": False, "return_dict": True, **kwargs})

    def logits(self, encoding: Encoding) -> Tensor:
        """Logits of a batch, (batch, tokens, vocabulary)."""
        return self.forward(encoding).logits

    def head(self, h: Tensor) -> Tensor:
        """Logits of hidden states h (..., m): final norm and language-model head, in the model's own dtype.

        Applied to the output of the last block this gives the model's logits; applied to an earlier block it
        is the "logit lens" that MEMIT's v_loss_layer uses.
        """
        norm, head = submodule(self.model, self.spec.norm), submodule(self.model, self.spec.head)
        h = norm(h.to(device=head.weight.device, dtype=head.weight.dtype))
        return head(h)

    # --- checks ---------------------------------------------------------------------------------------------

    def weight_shape(self, layer: int) -> tuple[int, int]:
        """(m, d) of a down projection."""
        rows, columns = self.weight(layer).shape
        return (columns, rows) if self.spec.orientation == "conv1d" else (rows, columns)

    def _check(self) -> None:
        model, spec = self.model, self.spec
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(f"{self.name} is an encoder-decoder; editkit edits decoder-only models")
        if not isinstance(submodule(model, spec.blocks), nn.ModuleList) or self.n_layers == 0:
            raise ModelError(f"{spec.blocks} of {self.name} is not a list of blocks; correct ArchSpec.blocks")
        for path in (spec.norm, spec.head, spec.embed):
            submodule(model, path)
        block = self.block_name(0)
        for path in (spec.mlp, spec.down, *spec.up, spec.attn, spec.attn_out):
            submodule(model, f"{block}.{path}")
        if (
            getattr(model.config, "quantization_config", None) is not None
            or not self.weight(0).is_floating_point()
        ):
            raise ModelError(
                f"{self.name} is quantised and cannot be edited exactly; load it in float32 or bfloat16"
            )
        if self.dtype == torch.float16:
            raise ModelError(
                f"{self.name} is in float16, whose range overflows in target optimisation; "
                "load it with dtype=torch.bfloat16 or torch.float32"
            )
        down = submodule(model, self.down_name(0))
        expected = Conv1D if spec.orientation == "conv1d" else nn.Linear
        if not isinstance(down, expected):
            raise ModelError(
                f"{self.down_name(0)} is a {type(down).__name__}, but the architecture table says "
                f"orientation={spec.orientation!r}; correct the ArchSpec"
            )
        width = submodule(model, spec.embed).weight.shape[1]
        if self.weight_shape(0)[0] != width and not hasattr(model.config, "word_embed_proj_dim"):
            raise ModelError(
                f"{self.down_name(0)} maps to width {self.weight_shape(0)[0]}, the residual stream has "
                f"{width}; ArchSpec.down must name the projection out of the MLP"
            )

    def _set_pad_token(self) -> None:
        tok = self.tokenizer
        if tok.pad_token_id is None:
            # Padded positions are masked everywhere, so any existing token will do.
            tok.pad_token = tok.eos_token or tok.unk_token
        if tok.pad_token_id is None:
            raise ModelError(
                f"the tokenizer of {self.name} has no pad, eos or unk token; set tokenizer.pad_token first"
            )
        size = len(submodule(self.model, self.spec.embed).weight)
        if not 0 <= tok.pad_token_id < size:
            raise ModelError(
                f"the padding token {tok.pad_token!r} has number {tok.pad_token_id}, {self.name} embeds {size} tokens; "
                "set tokenizer.pad_token = tokenizer.eos_token, or resize the embeddings first"
            )


def _short_name(source: str) -> str:
    """Hub names stay; of a local directory only the last part: results must not hold machine paths."""
    path = Path(source)
    return path.resolve().name if source and path.exists() else source


def _find_spec(model: PreTrainedModel) -> ArchSpec:
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} has no configuration; pass a causal LM of transformers")
    return check_config(config, type(model).__name__)


def load_lm(
    model: str | os.PathLike | PreTrainedModel,
    tokenizer=None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    spec: ArchSpec | None = None,
    **kwargs,
) -> LM:
    """Load a causal LM by name or path, or wrap a loaded model.

    model:     hub name, directory, a GGUF file (dequantised, see `gguf`), or a loaded model (kept in its dtype unless
               `dtype` is given).
    tokenizer: name, directory or object; default: the one stored with the model.
    dtype:     float32 by default when loading. bfloat16 is possible; edits then keep float32 masters of the
               edited matrices. float16 is refused.
    device:    moved there if given, else left where transformers puts it (`device_map` may be passed on).
    spec:      architecture row for model types outside the table.
    kwargs:    passed to `AutoModelForCausalLM.from_pretrained`, e.g. `revision`.

    Raises ModelError naming the fix.
    """
    source = model if isinstance(model, PreTrainedModel) else os.path.expanduser(os.fspath(model))
    if isinstance(source, str) and is_gguf(source):
        model, own = read_gguf(source, dtype or torch.float32, spec)
        tokenizer = own if tokenizer is None else tokenizer
    elif isinstance(source, str):
        check_source(source, dtype or torch.float32, spec, **kwargs)
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or torch.float32, **kwargs)
        except EditkitError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"cannot load {source!r} as a causal LM: {error}. Check the name or path; "
                f"known architectures: {', '.join(ARCHITECTURES)}"
            ) from error
    elif dtype is not None:
        model = model.to(dtype)
    if device is not None:
        model = model.to(device)
    if tokenizer is None:
        tokenizer = source if isinstance(source, str) else getattr(model.config, "_name_or_path", "")
        if not tokenizer:
            raise ModelError("the model object does not say where it was loaded from; pass tokenizer=...")
    if isinstance(tokenizer, (str, os.PathLike)):
        where = os.path.expanduser(os.fspath(tokenizer))
        try:
            tokenizer = AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"cannot load the tokenizer of {where!r}: {error}; pass tokenizer=..."
            ) from error
    return LM(model, tokenizer, spec, name=source if isinstance(source, str) else "")
