"""What the theme gets wrong for a book that is read from a folder, and links to pages that need not be there.

{chapter}`memoir/index`              the page's title as a link; plain words where it is not part of this build
{chapter}`Lifelong <memoir/index>`   with another text
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxRole


class Chapter(SphinxRole):
    """A link to a page of the contents, if the contents have it."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        match = re.fullmatch(r"(.*?)\s*<(\S+)>", self.text.strip())
        title, page = (match[1], match[2]) if match else ("", self.text.strip())
        if page not in self.env.found_docs:
            return [nodes.emphasis("", f"{title}: not in this build" if title else "not in this build")], []
        inner = nodes.inline("", title or page, classes=["xref", "std", "std-doc"])
        link = addnodes.pending_xref("", inner, refdomain="std", reftype="doc", reftarget=f"/{page}",
                                     refexplicit=bool(title), refwarn=True, refdoc=self.env.docname)  # fmt: skip
        return [link], []


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


def offer_notebooks(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """In the download menu of a page: the notebooks behind it, as they are run, in place of the page's source."""
    groups = [b for b in context.get("header_buttons", []) if b.get("label") == "download-buttons"]
    if not groups:
        return
    found = doctree.findall(nodes.reference) if doctree is not None else ()
    links = [link["refuri"] for link in found if "ek-runnable" in link["classes"]]
    notebooks = {url.rsplit("/", 1)[-1]: url for url in links}
    buttons = [
        {"type": "link", "url": url, "text": name, "icon": "fas fa-code", "label": "download-notebook-button",
         "tooltip": "Runnable notebook"}
        for name, url in notebooks.items()
    ]  # fmt: skip
    keep = [b for b in groups[0]["buttons"] if b["label"] == "download-pdf-button"]
    source = [b for b in groups[0]["buttons"] if b["label"] == "download-source-button"]
    groups[0]["buttons"] = [*buttons, *([] if buttons else source), *keep]


def setup(app: Sphinx) -> dict:
    app.add_role("chapter", Chapter())
    app.connect("config-inited", follow_the_system)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("html-page-context", offer_notebooks, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
