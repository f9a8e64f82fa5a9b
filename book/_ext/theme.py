"""What the theme gets wrong for a book that is read from a folder, without a server."""

from __future__ import annotations

from sphinx.application import Sphinx


def follow_the_system(app: Sphinx, config) -> None:
    """Light or dark as the reader's system is set, until the reader chooses."""
    config.html_context.setdefault("default_mode", "auto")


def drop_thebe(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Leave out the scripts of live code cells, which need a server and are put in twice."""
    for kind in ("script_files", "css_files"):
        if kind in context:
            files = list(context[kind])
            context[kind] = [
                f for f in files if "thebe" not in f"{f.filename} {f.attributes.get('body', '')}"
            ]


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", follow_the_system)
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
