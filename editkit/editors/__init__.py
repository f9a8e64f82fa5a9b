"""Editors: methods that write facts into the weights of a model.

editor = make_editor("memit", lm, layers=[4, 5, 6], statistics=second_moment(lm, [4, 5, 6], texts))
delta = editor.edit(facts)        # the model now states the facts
editor.restore()                  # and now it does not
with delta.applied(lm): ...       # here it does
"""

from .. import memory as _memory  # noqa: F401  registers the memory editors
from .alphaedit import AlphaEdit
from .base import EDITORS, Editor, make_editor, register
from .delta import Delta
from .ft import FT
from .hypernet import HORSE, MALMEN, MEND, RLEdit
from .latest import MemorizeLatest
from .lora import LoRA
from .memit import MEMIT, MEMITSeq
from .nse import NSE
from .prune import PRUNE
from .rect import RECT
from .regularized import Regularized
from .rome import ROME

__all__ = [
    "EDITORS", "FT", "HORSE", "MALMEN", "MEMIT", "MEND", "NSE", "PRUNE", "RECT", "ROME", "AlphaEdit", "Delta",
    "Editor", "LoRA", "MEMITSeq", "MemorizeLatest", "RLEdit", "Regularized", "make_editor", "register",
]  # fmt: skip
