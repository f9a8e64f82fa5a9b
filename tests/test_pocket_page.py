"""The page "Try it" as a reader uses it: buttons, keys, mistakes, links, both themes, paper."""

from __future__ import annotations

import re

import pytest
from browser import LAYOUT, MISSING, Browser, find_browser
from pocket_page import ROOT, open_page, standalone, try_it, wait

pytestmark = pytest.mark.xdist_group("pocket")


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip(MISSING)
    made = Browser(program, timeout=600)  # two streams of 300 edits on a busy machine
    yield made
    made.close()


def text(browser, selector: str) -> str:
    return browser.evaluate(
        f"[...document.querySelectorAll({selector!r})].map(e => e.textContent).join(' | ')"
    )


def press(browser, panel: str, label: str) -> None:
    browser.evaluate(f"""[...document.querySelectorAll('[data-try={panel}] button')]
        .find(b => b.textContent === {label!r}).click()""")
    wait(browser)


def ask(browser, prompt: str) -> str:
    """What the panel says to a typed prompt: an alert, or the sentence."""
    browser.evaluate(f"document.querySelector('[data-try=ask] input').value = {prompt!r}")
    press(browser, "ask", "Ask")
    return text(browser, "[data-try=ask] [role=alert]:not([hidden])") or text(browser, ".ek-try-sentence")


def test_one_edit_and_back(browser):
    open_page(browser)
    assert "unedited" in text(browser, ".ek-try-news")
    before = text(browser, ".ek-try-sentence")
    press(browser, "edit", "What else will move?")
    assert browser.evaluate("document.querySelectorAll('.ek-try-movers tbody tr').length") == 8
    press(browser, "edit", "Write the edit")
    verdict = text(browser, "[data-try=edit] .ek-try-verdict")
    assert "The edit holds; in other words (“The profession of Yara Farrow is …”) it holds as well" in verdict
    assert browser.evaluate("document.querySelectorAll('[data-try=edit] svg circle').length") > 700
    assert text(browser, "[data-try=ask] h4") == "as trained | now"
    assert "1 edit in the weights" in text(browser, ".ek-try-news")
    press(browser, "load", "Restore the model")
    assert "1,307,776 numbers are equal to the last bit" in text(browser, ".ek-try-news")
    browser.evaluate("document.querySelector('.ek-try-chip').click()")
    assert (
        text(browser, ".ek-try-sentence") == before or ask(browser, before.split(" is ")[0] + " is") == before
    )
    assert not browser.console


def test_mistakes_become_sentences(browser):
    open_page(browser)
    assert "The prompt is empty. Type" in ask(browser, "  ")
    assert "never seen the word “Farow”. Did you mean “Farrow”?" in ask(
        browser, "The occupation of Yara Farow is"
    )
    assert "never seen the word" in ask(browser, "Xyzzyqwert lives")
    assert "too long" in ask(browser, "The occupation of " * 120)
    assert "The occupation of Yara Farrow is" in ask(
        browser, "The occupation of Yara Farrow is"
    )  # and on it goes
    press(browser, "edit", "Write the edit")
    press(browser, "edit", "Write the edit")
    assert re.search(
        "was edited already, to .* or restore first", text(browser, "[data-try=edit] [role=alert]")
    )
    twice = "try { Pocket.session.edit([[7, 0], [7, 1]]).next(); } catch (e) { e.message }"
    assert "named twice" in browser.evaluate(twice)
    assert not browser.console


def test_a_wrong_link_is_a_sentence_and_the_page_works(browser):
    open_page(browser, "do=s60,9,100,1,20,0")
    assert "does not fit the page" in text(browser, "[data-try=load] [role=alert]")
    assert "The occupation" in ask(browser, "The occupation of Yara Farrow is")


def test_a_link_holds_the_whole_state(browser):
    open_page(browser)
    weights = """(() => { const W = Pocket.session.model.down(2); let h = 0;
        for (const x of W) h = (Math.imul(h, 31) + new Int32Array(new Float32Array([x]).buffer)[0]) | 0;
        return h; })()"""
    start = browser.evaluate(weights)
    browser.evaluate("""(() => { const set = (i, v) => {
        const s = document.querySelectorAll('[data-try=stream] select')[i];
        s.value = v; s.dispatchEvent(new Event('change')); }; set(0, 60); set(1, 10);
        const l = document.querySelector('[data-try=stream] input[type=range]'); l.value = 4;
        l.dispatchEvent(new Event('input'));
        document.querySelector('[role=switch]').click(); })()""")
    press(browser, "edit", "Write the edit")
    press(browser, "stream", "Run the stream")
    link = browser.evaluate("document.querySelector('.ek-try-address').value")
    assert browser.evaluate("location.href") == link  # the address bar follows
    seen = browser.evaluate(weights), text(browser, "[data-try=stream] .ek-try-verdict")
    settings = browser.evaluate("JSON.stringify(Pocket.session.settings)")
    open_page(browser)
    open_page(browser, link.split("#", 1)[1])
    assert seen[0] != start
    assert (browser.evaluate(weights), text(browser, "[data-try=stream] .ek-try-verdict")) == seen
    assert browser.evaluate("JSON.stringify(Pocket.session.settings)") == settings


def test_a_link_inside_the_page_starts_anew(browser):
    open_page(browser, "do=e5.0,2,100,1,20,0")
    browser.evaluate("location.hash = 'do=e7.1,2,100,1,20,0'; new Promise(done => setTimeout(done, 200))")
    wait(browser)
    assert browser.evaluate("[...Pocket.session.written.keys()]") == [7]


def test_the_prepared_states_open_and_the_labyrinth_shows_its_claim(browser):
    for name, state in sorted(try_it.STATES.items(), key=lambda item: item[0] == "labyrinth"):
        open_page(browser, state.replace("s300", "s40") if name != "labyrinth" else state)
        assert not text(browser, "[role=alert]:not([hidden])"), name
        assert not browser.console
    without, kept = browser.evaluate("Pocket.session.runs.map(r => r.points.at(-1).kept)")
    assert without < 200 < 270 < kept
    assert browser.evaluate("Pocket.picture()") == (ROOT / "book/_static/try_it_still.svg").read_text(), (
        "the still picture is not what the page draws: tools/try_it_still.py"
    )


def test_the_stream_can_be_stopped_and_goes_on(browser):
    open_page(browser)
    browser.evaluate("""(() => { [...document.querySelectorAll('[data-try=stream] button')][0].click();
        return new Promise(done => setTimeout(done, 700)); })()""")
    assert browser.evaluate("document.querySelectorAll('[data-action]:not(:disabled)').length") == 0
    press(browser, "load", "Stop")
    browser.evaluate("new Promise(done => setTimeout(done, 300))")
    wait(browser)
    written = browser.evaluate("Pocket.session.written.size")
    assert 0 < written < 300 and written % 20 == 0  # between two batches
    assert f"Stopped after {written} edits" in text(browser, ".ek-try-news")
    assert f"s{written}," in browser.evaluate("document.querySelector('.ek-try-address').value")
    assert browser.evaluate("Pocket.session.keeps()") > 0.9 * written


def test_the_page_breathes_while_it_works(browser):
    open_page(browser)
    longest = browser.evaluate("""(async () => {
        [...document.querySelectorAll('[data-try=stream] button')][0].click();
        let worst = 0, last = performance.now();
        for (let i = 0; i < 60; i++) {
            await new Promise(done => setTimeout(done, 0));
            worst = Math.max(worst, performance.now() - last); last = performance.now();
        }
        return worst; })()""")
    press(browser, "load", "Stop")
    assert longest < 1000  # slices are 12 ms; the rest is the shared machine


def test_keyboard_and_labels(browser):
    open_page(browser)
    nameless = browser.evaluate("""[...document.querySelectorAll('main :is(input, select, button, progress)')]
        .filter(e => !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label')))
        .map(e => e.outerHTML)""")
    assert nameless == []
    assert browser.evaluate("document.querySelectorAll('main svg[role=img]:not([aria-label])').length") == 0
    browser.evaluate("document.querySelector('.ek-try-gridbox').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    said = text(browser, "[data-try=stream] .ek-try-said")
    columns = browser.evaluate(
        "Math.max(5, Math.floor(document.querySelector('.ek-try-gridbox').clientWidth / 17))"
    )
    assert (
        said.startswith(browser.evaluate(f"Pocket.session.facts[{columns + 1}].prompt"))
        and "not edited" in said
    )
    # states differ in shape, not only in colour
    shapes = browser.evaluate("""(() => { const S = Pocket.session;
        S.written.set(0, {choice: 0, holds: true, order: 0});
        S.written.set(1, {choice: 0, holds: false, order: 1}); S.settings.lam = 100;
        document.querySelector('[role=switch]').click(); const g = document.querySelector('.ek-try-grid');
        return [0, 1, 2].map(i => g.children[i].tagName + g.children[i].getAttribute('r')); })()""")
    assert len(set(shapes)) == 3


def test_on_paper_the_still_picture_stands_in(browser):
    page = (ROOT / "book" / "try_it.md").read_text(encoding="utf-8")
    assert "_static/try_it_still.svg" in page and ":class: ek-try-still" in page
    open_page(browser)
    browser.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<figure class=\"ek-try-still\">still</figure>')"
    )
    shown = "getComputedStyle(document.querySelector({!r})).display"
    look = [shown.format(s) for s in ("[data-try=ask]", "figure.ek-try-still")]
    assert [browser.evaluate(x) == "none" for x in look] == [False, True]
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert [browser.evaluate(x) == "none" for x in look] == [True, False]
    browser.call("Emulation.setEmulatedMedia", media="")


def test_a_phone(browser):
    open_page(browser, width=390)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    press(browser, "edit", "Write the edit")
    assert browser.evaluate("document.querySelectorAll('.ek-try-movers tbody tr').length") == 8
    assert browser.evaluate(LAYOUT) == []


def test_a_missing_file_is_a_sentence(browser, tmp_path):
    for path in standalone().parent.iterdir():
        if path.name != "model-3.js":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    browser.open(tmp_path / "index.html")
    for _ in range(100):
        if text(browser, "[role=alert]"):
            break
        browser.evaluate("new Promise(done => setTimeout(done, 100))")
    assert "model-3.js of the model cannot be read. Copy the book again" in text(browser, "[role=alert]")
