"""The companion world, its records and the companion model."""

from .companion import load_companion, load_world
from .world import Biography, Statement, World

__all__ = ["Biography", "Statement", "World", "load_companion", "load_world"]
