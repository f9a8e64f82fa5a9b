"""Memory editors: methods that keep their edits beside the frozen model.

editor = make_editor("memoir", lm, layer=4)
editor.edit(facts)                # lm.model(...) and lm.model.generate(...) now state the facts
with editor.detached(): ...       # here they do not
editor.save("facts.safetensors")  # open_memory("facts.safetensors", lm) takes it up again
"""

from .base import MemoryEdit, MemoryEditor, open_memory
from .defer import DEFER
from .grace import GRACE
from .in_context import InContext
from .loka import LOKA
from .memoir import Memoir
from .precedents import GPM, PackNet, SparCL, SupSup
from .retrieval import Retrieval
from .wise import WISE

__all__ = [
    "DEFER", "GPM", "GRACE", "LOKA", "WISE", "InContext", "Memoir", "MemoryEdit", "MemoryEditor", "PackNet",
    "Retrieval", "SparCL", "SupSup", "open_memory",
]  # fmt: skip
