"""Memory editors: methods that keep their edits beside the frozen model.

editor = make_editor("memoir", lm, layer=4)
editor.edit(facts)                # lm.model(...) and lm.model.generate(...) now state the facts
with editor.detached(): ...       # here they do not
editor.save("facts.safetensors")  # open_memory("facts.safetensors", lm) takes it up again
"""

from .base import MemoryEdit, MemoryEditor, open_memory
from .memoir import Memoir

__all__ = ["Memoir", "MemoryEdit", "MemoryEditor", "open_memory"]
