"""The rooms of the package: read from its imports, drawn for the contributors' page, and held by the tests.

```{house}      the picture and the table of rooms
"""

from __future__ import annotations

import ast
from pathlib import Path

import companion
from docutils import nodes
from sphinx.application import Sphinx

import editkit

PACKAGE = Path(editkit.__file__).parent
# From the bottom up; rooms of one floor do not know each other.
FLOORS = (
    ("base",),
    ("linear", "models"),
    ("locate", "scoring", "corpora"),
    ("methods",),
    ("entanglement",),
    ("press",),
    ("studies",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def module_name(path: Path) -> str:
    parts = ("editkit", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(name: str) -> str:
    """The room of a dotted name; empty for the package itself."""
    return [*name.split("."), ""][1]


def imported(name: str, text: str, is_package: bool, known) -> set[str]:
    """Modules of editkit that the source of module `name` imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("editkit.")}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            home = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*home, *([node.module] if node.module else [])])
            if base.split(".")[0] == "editkit":
                full = [f"{base}.{alias.name}" for alias in node.names]
                found |= {f if f in known else base for f in full}
    return found


def arrows() -> dict[str, set[str]]:
    """Module -> modules of editkit it imports."""
    known = modules()
    return {
        name: imported(name, path.read_text(encoding="utf-8"), path.name == "__init__.py", known)
        for name, path in known.items()
    }


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports from a room to one that does not lie below it."""
    return sorted(
        f"{source} imports {target}"
        for source, targets in edges.items()
        for target in targets
        if room(source) in FLOOR
        and room(target) != room(source)
        and FLOOR.get(room(target), len(FLOORS)) >= FLOOR[room(source)]
    )


def picture(edges: dict[str, set[str]], lines: dict[str, int]) -> str:
    """The floors as an SVG: one box a room with its lines, one arrow for each pair of rooms that know each other."""
    width, height, gap = 720, 52, 40
    place = {}
    for level, floor in enumerate(FLOORS):
        y = (len(FLOORS) - 1 - level) * (height + gap) + 8
        share = width / len(floor)
        for k, name in enumerate(floor):
            place[name] = (k * share + share / 2, y, min(share - 24, 200))
    pairs = {(room(a), room(b)) for a, targets in edges.items() for b in targets}
    pairs = sorted((a, b) for a, b in pairs if a in place and b in place and a != b)
    drawn = []
    for a, b in pairs:
        (xa, ya, _), (xb, yb, _) = place[a], place[b]
        far = FLOOR[a] - FLOOR[b] > 1
        bend = 130 + 34 * (FLOOR[a] - FLOOR[b]) if far else 0
        side = -1 if (FLOOR[a] + FLOOR[b]) % 2 else 1
        x1, y1, x2, y2 = xa, ya + height, xb, yb
        path = f"M{x1:.0f} {y1} C{x1 + side * bend:.0f} {y1 + 20} {x2 + side * bend:.0f} {y2 - 20} {x2:.0f} {y2 - 3}"
        drawn.append(f'<path d="{path}" class="{"far" if far else "near"}" marker-end="url(#ek-tip)"/>')
    for name, (x, y, w) in place.items():
        drawn.append(f'<rect x="{x - w / 2:.0f}" y="{y}" width="{w:.0f}" height="{height}" rx="6"/>')
        drawn.append(f'<text x="{x:.0f}" y="{y + 22}" class="name">{name}</text>')
        drawn.append(f'<text x="{x:.0f}" y="{y + 40}">{lines[name]:,} lines</text>')
    total = len(FLOORS) * (height + gap) - gap + 16
    label = "Rooms of editkit from studies at the top to base at the bottom; every arrow points down."
    size = 'markerWidth="7" markerHeight="7" refX="5" refY="3" orient="auto"'
    tip = f'<marker id="ek-tip" {size}><path d="M0 0 L6 3 L0 6 z"/></marker>'
    return (
        f'<svg class="ek-house" viewBox="0 0 {width} {total}" role="img" aria-label="{label}"><defs>{tip}</defs>'
        + "".join(drawn)
        + "</svg>"
    )


class House(companion.Base):
    """Picture and table of the rooms, from the source as it is."""

    required_arguments = 0

    def build(self) -> list[nodes.Node]:
        known, edges = modules(), arrows()
        for path in known.values():
            self.env.note_dependency(str(path))
        count = dict.fromkeys(FLOOR, 0)
        for name, path in known.items():
            if room(name) in count:
                count[room(name)] += len(path.read_text(encoding="utf-8").splitlines())
        rows = []
        for floor in reversed(FLOORS):
            for name in floor:
                text = ast.get_docstring(
                    ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))
                )
                below = sorted(
                    {room(b) for a, to in edges.items() if room(a) == name for b in to} & set(FLOOR)
                )
                below = ", ".join(b for b in below if b != name) or "nothing"
                first = (text or "").split("\n\n")[0].replace("\n", " ")
                rows.append([[nodes.literal("", name)], companion.coded(first), below, f"{count[name]:,}"])
        table = companion.make_table(["room", "what lives there", "imports", "lines"], rows)
        return [nodes.raw("", picture(edges, count), format="html"), table]


def setup(app: Sphinx) -> dict:
    app.add_directive("house", House)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
