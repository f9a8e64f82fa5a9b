"""The API reference: docstrings and signatures of a package, read from the source without importing it.

    ```{api} editkit.methods          one module, or a package with all its modules
    ```{api-index}                    all documented modules with their first lines
    {py:func}`editkit.models.lm.load_lm` refers to an entry from any page

Public is what has no leading underscore; `main` modules of the command line are left out. Options of
configurations (`editkit.base.config.option`) become tables.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import companion
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import editkit

PACKAGE = Path(editkit.__file__).parent
COMMANDS = ("cli", "command")  # described by --help
_COLUMNS = re.compile(r"\S {2,}\S")


def module_files(name: str) -> list[tuple[str, Path]]:
    """(dotted name, file) of a module, or of a package and its public modules."""
    parts = name.split(".")[1:]
    path = PACKAGE.joinpath(*parts)
    if path.with_suffix(".py").is_file():
        return [(name, path.with_suffix(".py"))]
    if not path.is_dir():
        raise companion.Lookup(f"there is no module {name}")
    found = [(name, path / "__init__.py")] if parts and (path / "__init__.py").is_file() else []
    inner = [p for p in sorted(path.glob("*.py")) if not p.name.startswith("_") and p.stem not in COMMANDS]
    return [*found, *((f"{name}.{p.stem}", p) for p in inner)]


def public(body: list[ast.stmt]) -> list[ast.stmt]:
    """Functions and classes of a module, methods of a class, without leading underscore."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [n for n in body if isinstance(n, kinds) and not n.name.startswith("_")]
    return [n for n in found if not any("overload" in ast.unparse(d) for d in n.decorator_list)]


def signature(node: ast.FunctionDef, *, method: bool = False) -> str:
    """The signature as source text, without self."""
    arguments = ast.unparse(node.args)
    if method:
        arguments = re.sub(r"^(self|cls)(, (/, )?|$)", "", arguments)
    return f"({arguments})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def options(node: ast.ClassDef) -> list[tuple[str, str, str, str, str]]:
    """(name, type, default, meaning, source) of the fields made by `option(default, doc, source=...)`."""
    rows = []
    for field in node.body:
        call = getattr(field, "value", None)
        if not (isinstance(field, ast.AnnAssign) and isinstance(call, ast.Call)):
            continue
        if getattr(call.func, "id", "") != "option" or len(call.args) < 2:
            continue
        more = {k.arg: k.value for k in call.keywords}
        source = more.get("source")
        texts = [literal(call.args[1]), literal(source) if source is not None else ""]
        rows.append((field.target.id, ast.unparse(field.annotation), ast.unparse(call.args[0]), *texts))
    return rows


def literal(node: ast.expr) -> str:
    """The text of a constant; the source of anything else."""
    try:
        return str(ast.literal_eval(node))
    except ValueError:
        return ast.unparse(node)


def fields(node: ast.ClassDef) -> list[tuple[str, str]]:
    """(name: type, default) of the plain annotated fields of a dataclass."""
    decorated = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
    if not decorated or options(node):
        return []
    return [
        (f"{f.target.id}: {ast.unparse(f.annotation)}", ast.unparse(f.value) if f.value else "")
        for f in node.body
        if isinstance(f, ast.AnnAssign) and not f.target.id.startswith("_")
    ]


# -------------------------------------------------------------------- docstrings as nodes


def prose(text: str | None) -> list[nodes.Node]:
    """A docstring: paragraphs, indented or column-aligned blocks as they are, `code` as code."""
    made: list[nodes.Node] = []
    for block in re.split(r"\n\s*\n", textwrap.dedent(text or "").strip()):
        lines = block.split("\n")
        if all(line.startswith("    ") for line in lines):
            code = nodes.literal_block(block, textwrap.dedent(block), language="python")
            made.append(code)
        elif any(_COLUMNS.search(line) for line in lines) or any(line.startswith(" ") for line in lines):
            made.append(nodes.literal_block(block, block, language="none", classes=["ek-aligned"]))
        else:
            made.append(nodes.paragraph("", "", *companion.coded(" ".join(lines))))
    return [m for m in made if m.astext().strip()]


class Api(companion.Base):
    """One package or module."""

    def build(self) -> list[nodes.Node]:
        made: list[nodes.Node] = []
        for name, path in module_files(self.arguments[0]):
            self.env.note_dependency(str(path))
            tree = ast.parse(path.read_text(encoding="utf-8"))
            made.append(self.module(name, tree, public(tree.body)))
        return made

    def module(self, name: str, tree: ast.Module, entries: list[ast.stmt]) -> nodes.section:
        section = nodes.section("", nodes.title("", "", nodes.literal("", name)), ids=[f"module-{name}"])
        self.register(name, "module", f"module-{name}")
        section += prose(ast.get_docstring(tree))
        for node in entries:
            section += self.entry(name, node)
        return section

    def register(self, name: str, kind: str, node_id: str) -> None:
        domain = self.env.get_domain("py")
        if kind == "module":
            domain.note_module(name, node_id, "", "", False)
        domain.note_object(name, kind, node_id, location=self.get_location())

    def entry(self, parent: str, node, *, method: bool = False) -> addnodes.desc:
        full = f"{parent}.{node.name}"
        is_class = isinstance(node, ast.ClassDef)
        decorators = [ast.unparse(d) for d in node.decorator_list]
        is_property = method and any(d.split(".")[-1] in ("property", "cached_property") for d in decorators)
        kind = "class" if is_class else "method" if method else "function"
        desc = addnodes.desc(domain="py", objtype=kind, no_index=False, classes=["py", kind])
        head = addnodes.desc_signature("", "", ids=[full], module=parent, fullname=node.name)
        word = "class " if is_class else "property " if is_property else ""
        if word:
            head += addnodes.desc_annotation("", word)
        head += addnodes.desc_name("", node.name)
        if is_class:
            bases = ", ".join(ast.unparse(b) for b in node.bases)
            head += [addnodes.desc_addname("", f"({bases})")] if bases else []
        elif is_property:
            head += [addnodes.desc_addname("", f": {ast.unparse(node.returns)}")] if node.returns else []
        else:
            head += addnodes.desc_addname("", signature(node, method=method))
        desc += head
        self.register(full, kind, full)
        content = addnodes.desc_content()
        content += prose(ast.get_docstring(node))
        if is_class:
            content += self.class_tables(node)
            for inner in public(node.body):
                if not isinstance(inner, ast.ClassDef):
                    content += self.entry(full, inner, method=True)
        desc += content
        return desc

    def class_tables(self, node: ast.ClassDef) -> list[nodes.Node]:
        made: list[nodes.Node] = []
        if rows := options(node):
            body = [
                [[nodes.literal("", n)], [nodes.literal("", t)], [nodes.literal("", d)], companion.coded(m), s]
                for n, t, d, m, s in rows
            ]
            made.append(
                companion.make_table(["option", "type", "default", "meaning", "source"], body, ["ek-options"])
            )
        elif rows := fields(node):
            body = [[[nodes.literal("", name)], [nodes.literal("", d)] if d else ""] for name, d in rows]
            made.append(companion.make_table(["field", "default"], body))
        return made


class ApiIndex(companion.Base):
    """Every module with the first line of its docstring, linked to its page."""

    required_arguments = 0

    def build(self) -> list[nodes.Node]:
        known = documented(Path(self.env.srcdir), self.env.found_docs)
        rows = []
        for name, path in modules():
            tree = ast.parse(path.read_text(encoding="utf-8"))
            first = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
            link = nodes.literal("", name)
            if name in known:
                uri = self.env.app.builder.get_relative_uri(self.env.docname, known[name])
                link = nodes.reference("", "", link, refuri=f"{uri}#module-{name}", internal=True)
            rows.append([[link], companion.coded(first)])
        return [companion.make_table(["module", "what it is for"], rows, ["ek-modules"])]


def modules() -> list[tuple[str, Path]]:
    """(dotted name, file) of all public modules of the package."""
    files = [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if not any(p.startswith("_") and p != "__init__.py" for p in path.relative_to(PACKAGE).parts)
    ]
    return [(dotted(p), p) for p in files if p.stem not in COMMANDS and p != PACKAGE / "__init__.py"]


def documented(source: Path, pages: Iterable[str]) -> dict[str, str]:
    """{module: page of the reference that describes it}."""
    found = {}
    for page in sorted(p for p in pages if p.startswith("api/")):
        text = (source / f"{page}.md").read_text(encoding="utf-8")
        for name in re.findall(r"^```\{api\} (\S+)", text, re.M):
            found |= {module: page for module, _ in module_files(name)}
    return found


def dotted(path: Path) -> str:
    """The module name of a file of the package."""
    parts = ["editkit", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def setup(app: Sphinx) -> dict:
    app.add_directive("api", Api)
    app.add_directive("api-index", ApiIndex)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
