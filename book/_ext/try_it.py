"""The interactive page "Try it": its panels, its scripts, and links to prepared states of it.

    ```{try-it} ask                           a panel: load, ask, edit, stream, compare, link
    {try-it}`Watch it forget <labyrinth>`     a link to the page in a prepared state (STATES)

Scripts (book/_ext/try_it/*.js) and the model (`editkit.press.pocket`) are written into _static/try_it and loaded by
plain <script src>, which works from a folder where fetch and modules do not.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from editkit.press.pocket import write_page

logger = logging.getLogger(__name__)
PAGE, FOLDER = "try_it", "_static/try_it"
SOURCES = Path(__file__).with_name("try_it")
SCRIPTS = ("engine.js", "edit.js", "session.js", "view.js", "page.js", "model.js")
PANELS = {
    "load": "Loading the pocket companion. If this line stays for more than a minute, the browser is older than 2021 "
    "or the book was copied without its folder _static/try_it; the text of the page can be read all the same.",
    "ask": "Here a prompt can be asked.",
    "edit": "Here one fact can be edited.",
    "stream": "Here a stream of edits can be watched.",
    "compare": "Here one batch can be compared with many.",
    "link": "Here stands the link to the state of the page.",
}
# What the links of the chapters open: everything behind "#" of the page's address (session.js: link and replay).
_SETTINGS = "{layers},{lam},{history},{batch},{spread}"


def _stream(n: int, *, layers=2, lam=100, history=1, batch=20, spread=0) -> str:
    return f"s{n}," + _SETTINGS.format(layers=layers, lam=lam, history=history, batch=batch, spread=spread)


STATES = {
    "start": "",
    "labyrinth": f"do={_stream(300, history=0)}~r~{_stream(300)}&show=stream",
    "clare": "fact=0.0&predict=1&show=edit",
    "memoir": f"do={_stream(300, history=0, batch=5, lam=10)}&show=stream",
    "horse": f"do={_stream(300, layers=12, lam=30)}~r~{_stream(300, layers=12, lam=30, spread=1)}&show=stream",
}


class TryIt(SphinxDirective):
    """One panel; what it says until the scripts have run stays where they cannot run."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in PANELS:
            logger.warning(f"no panel {name!r}; there are {', '.join(PANELS)}", location=self.get_location())
            return []
        html = f'<div class="ek-try" data-try="{name}"><p class="ek-try-wait">{PANELS[name]}</p></div>'
        if name == "load":
            up = "../" * self.env.docname.count("/")
            html += "".join(f'<script defer src="{up}{FOLDER}/{script}"></script>' for script in SCRIPTS)
        return [nodes.raw("", html, format="html")]


class Prepared(SphinxRole):
    """A link to a prepared state."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        match = re.fullmatch(r"(.*?)\s*<(\S+)>", self.text.strip(), re.S)
        if not match or match[2] not in STATES:
            logger.warning(f"{self.text!r}: write 'text <state>' with a state of {', '.join(STATES)}",
                           location=self.get_location())  # fmt: skip
            return [nodes.emphasis("", self.text)], []
        if PAGE not in self.env.found_docs:
            return [nodes.emphasis("", f"{match[1]}: not in this build")], []
        state = STATES[match[2]]
        link = "../" * self.env.docname.count("/") + f"{PAGE}.html" + (f"#{state}" if state else "")
        return [nodes.reference("", match[1], refuri=link, internal=True, classes=["ek-try-link"])], []


def write_scripts(app: Sphinx, env) -> None:
    """Scripts and model into the book, if it has the page."""
    if app.builder.format != "html" or PAGE not in env.found_docs:
        return
    target = Path(app.outdir) / FOLDER
    write_page(target)
    for path in SOURCES.glob("*.js"):
        shutil.copyfile(path, target / path.name)


def setup(app: Sphinx) -> dict:
    app.add_directive("try-it", TryIt)
    app.add_role("try-it", Prepared())
    app.connect("env-updated", write_scripts)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
