"""Methods of model editing under one contract: `weights`, `memory` and `hypernet`, one file each, and the registry.

editor = make_editor("memit", lm, layers=[4, 5, 6], statistics=second_moment(lm, [4, 5, 6], texts))
delta = editor.edit(facts)        # the model now states the facts
editor.restore()                  # and now it does not
with delta.applied(lm): ...       # here it does

May import `base`, `linear`, `models`, `locate` and `scoring`.
"""

from . import memory as _memory  # noqa: F401  registers the memory editors
from .base import EDITORS, Editor, make_editor, register
from .delta import Delta
from .hypernet.editor import HORSE, MALMEN, MEND, RLEdit
from .weights.alphaedit import AlphaEdit
from .weights.ft import FT
from .weights.latest import MemorizeLatest
from .weights.lora import LoRA
from .weights.memit import MEMIT, MEMITSeq
from .weights.nse import NSE
from .weights.prune import PRUNE
from .weights.rect import RECT
from .weights.regularized import Regularized
from .weights.rome import ROME

__all__ = [
    "EDITORS", "FT", "HORSE", "MALMEN", "MEMIT", "MEND", "NSE", "PRUNE", "RECT", "ROME", "AlphaEdit", "Delta",
    "Editor", "LoRA", "MEMITSeq", "MemorizeLatest", "RLEdit", "Regularized", "make_editor", "register",
]  # fmt: skip
