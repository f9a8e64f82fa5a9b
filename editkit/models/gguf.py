"""Models stored in a GGUF file, as llama.cpp uses them: read, dequantised, and saved as an ordinary folder.

GGUF files mostly hold weights of 4 to 8 bits in blocks. Editing needs plain matrices, so every block is multiplied
out when the file is read. The result computes what the quantised file computes; an edit is then exact for these
weights, but it is not an edit of the checkpoint that the file was made from, and it does not survive quantising
again: a change smaller than half a step of a block is rounded away.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..base.errors import EditkitError, ModelError
from ..base.paths import user_path
from .architectures import ArchSpec
from .preflight import check_config, check_fits, empty_model, weight_bytes

NOTE = (
    "{name} is a GGUF file: its blocks are multiplied out to {dtype}. An edit is exact for these weights; it is no "
    "edit of the checkpoint the file was made from, and quantising the edited model again can round it away"
)
_MAGIC = b"GGUF"
_PROBES = ("The capital of France is Paris.", " Zürich, 3.5 km\n\tTrận  đấu; <|im_start|>user", "naïve 北京 😀")


def is_gguf(source: str | Path) -> bool:
    """Whether a model source is to be read as a GGUF file: by its name, as no other file is a model by itself."""
    return str(source).lower().endswith(".gguf")


def read_gguf(
    path: str | Path, dtype: torch.dtype = torch.float32, spec: ArchSpec | None = None
) -> tuple[PreTrainedModel, object]:
    """(model, tokenizer) of a GGUF file, dequantised to `dtype`, without any memory of where they came from.

    Warns once what this means for edits. Raises ModelError if the file or the package that reads it is missing, if it
    is no complete GGUF file, or if its architecture cannot be converted or edited.
    """
    path = user_path(path)
    if not path.is_file():
        raise ModelError(f"{str(path)!r} is not a file here; give the path of a .gguf file")
    with open(path, "rb") as file:
        if file.read(4) != _MAGIC:
            raise ModelError(f"{path.name} does not begin like a GGUF file; download it again")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"reading {path.name} needs the package 'gguf', which is not installed: pip install 'editkit[real]'"
        )
    warnings.warn(NOTE.format(name=path.name, dtype=str(dtype).removeprefix("torch.")), stacklevel=2)
    where = {"gguf_file": path.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path.parent, **where)
        vars(config).pop("quantization_config", None)
        check_config(config, path.name, spec)
        check_fits(weight_bytes(empty_model(config), dtype), dtype, path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        gguf_config = getattr(transformers, "GgufConfig", None)  # releases without it always dequantise
        whole = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **where, **whole)
    except EditkitError:
        raise
    except Exception as error:  # the readers raise whatever a broken byte leads to
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"{path.name} cannot be read as a causal LM: {reason}. Either the file is damaged (download it again), or "
            f"transformers {transformers.__version__} cannot convert its architecture: take the original checkpoint"
        ) from error
    vars(model.config).pop("quantization_config", None)
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            setattr(model, name, None)
    return model.eval(), tokenizer


def save_folder(model: PreTrainedModel, tokenizer, folder: str | Path) -> None:
    """Write an ordinary model folder and check that the tokenizer reads texts as before.

    Raises ModelError if it does not: transformers could then not store a tokenizer of this kind.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    for text in _PROBES:
        if again(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise ModelError(
                f"the saved tokenizer reads {text!r} otherwise than the one of the GGUF file; load the file itself"
            )
