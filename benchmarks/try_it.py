"""Speed of the page "Try it": forward passes a second, and a stream of 300 edits, in a headless Chromium.

    python benchmarks/try_it.py --out benchmarks/results/try_it.json

Processor time of the browser with all its processes, and wall time beside it, because the machine may do other things;
medians over the repeats. A pass is whole: tokens, all blocks, logits. A stream is what the button does: 300 edits in
batches of 20 with history, every written edit and every untouched fact read again after each batch, curves and grids
drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import MISSING, Browser, find_browser
from pocket_page import open_page, wait

from editkit.press.provenance import git_state, hardware, package_versions

N_PASSES = 600
PASSES = """(() => { const S = Pocket.session;
  for (let n = 0; n < %d; n++) { const text = S.model.text(S.tokenizer.encode(S.facts[n %% 300].prompt));
    S.model.head(S.model.run(text).out, 1); } })()"""
EDITS = """(() => { const S = Pocket.session;
  for (let i = 0; i < 300; i += 20) for (const _ of S.edit(S.facts.slice(i, i + 20).map(f => [f.id, 0]))); })()"""
STREAM = "[...document.querySelectorAll('[data-try=stream] button')][0].click()"
RESTORE = "Pocket.session.restore()"


def processor(browser: Browser) -> float:
    """Seconds of processor time of the browser and its processes so far."""
    top = psutil.Process(browser.process.pid)
    times = [p.cpu_times() for p in (top, *top.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def timed(browser: Browser, code: str) -> tuple[float, float]:
    """(processor, wall) seconds of a piece of JavaScript and the job that it starts."""
    cpu, wall = processor(browser), time.perf_counter()
    browser.evaluate(code)
    wait(browser)
    return processor(browser) - cpu, time.perf_counter() - wall


def measure(repeats: int) -> dict:
    """Medians over the repeats, and all values."""
    program = find_browser()
    if program is None:
        raise SystemExit(MISSING)
    browser = Browser(program)
    work = {"passes": PASSES % N_PASSES, "edits": EDITS, "stream": STREAM}
    seen = {name: [] for name in work}
    try:
        open_page(browser)
        browser.evaluate(PASSES % 100)  # the browser compiles what it has seen often
        for _ in range(repeats):
            for name, code in work.items():
                seen[name].append(timed(browser, code))
                browser.evaluate(RESTORE)
        version = browser.call("Browser.getVersion")["product"]
    finally:
        browser.close()
    seconds = {
        kind: {name: statistics.median(values[i] for values in seen[name]) for name in work}
        for i, kind in enumerate(("processor", "wall"))
    }
    per_second = {
        "passes": N_PASSES / seconds["processor"]["passes"],
        "edits": 300 / seconds["processor"]["stream"],
    }
    return {"seconds": seconds, "per_second": per_second, "all": seen, "browser": version}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file; printed if not given")
    args = parser.parse_args()
    report = {"benchmark": "try_it", "parameters": {"repeats": args.repeats}, **measure(args.repeats)}
    report["load_average"] = os.getloadavg()[0]
    report["provenance"] = {
        "git": git_state(Path(__file__).parents[1]),
        "hardware": hardware(),
        "packages": package_versions(),
    }
    text = json.dumps(report, indent=1) + "\n"
    args.out.write_text(text, encoding="utf-8") if args.out else print(text)


if __name__ == "__main__":
    main()
