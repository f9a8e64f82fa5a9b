"""Edit with one method, then measure everything: scores, what is left of the model, and what it cost."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ...base.errors import ConfigError
from ...base.paths import user_path
from ...methods.hypernet.data import EditRecord
from ...methods.hypernet.network import Hypernetwork, load_hypernetwork
from ...methods.memory.calibration import from_data
from ...models.facts import Fact
from ...models.lm import LM
from ...scoring import AXES, Baseline, score
from ..arms import arm_named, make_arm
from ..bench import Bench
from ..horse.bench import train
from ..horse.costs import peak_memory
from ..labyrinth.health import recall, text_perplexity
from ..memoir.streams import inference_seconds
from ..streams import edit_stream, spread

# The rows of the comparison, by their names in `studies.arms`.
METHODS = (
    "unedited", "ft-l", "ft-m", "lora", "rome", "memit", "memit-seq", "alphaedit-naive", "alphaedit", "rect",
    "rect-compensated", "prune-total", "prune-compensated", "nse", "nse-compensated", "mend", "malmen", "rledit",
    "horse", "grace", "defer", "wise", "loka", "memoir", "memoir-paper", "in-context", "retrieval", "retrieval-tokens",
)  # fmt: skip
PROTOCOLS = ("generate", "rome", "easyedit")
REGIMES = ("once", "stream")


@dataclasses.dataclass(frozen=True)
class Examination:
    """What every method is asked, the same for all; made on the unedited model.

    scored: facts whose probes are asked.   texts: for perplexity.   statements: true facts that no edit touches.
    unrelated: prompts on which MEMOIR's threshold is calibrated; none is a probe or among the statements.
    timed: prompts of the timed forward pass.
    """

    bench: Bench
    scored: list[Fact]
    axes: tuple[str, ...]
    texts: list[str]
    statements: list[tuple[str, str, str]]
    unrelated: list[str]
    timed: list[str]
    background: list[str]
    baseline: Baseline

    @classmethod
    def of(
        cls,
        bench: Bench,
        seed: int,
        *,
        n_scored: int | None = None,
        n_texts: int = 30,
        n_unrelated: int = 300,
        n_timed: int = 32,
        n_background: int = 100,
    ) -> Examination:
        """For the facts and bystanders of a bench. n_scored: facts scored, evenly spread (None: all)."""
        scored = spread(bench.facts, n_scored)
        fields = {"efficacy": None, "paraphrase": "paraphrases", "consequence": "consequences"}
        axes = tuple(
            a for a in AXES if fields.get(a, a) is None or any(getattr(f, fields.get(a, a)) for f in scored)
        )
        asked = {p.prompt for f in bench.facts for p in (*f.neighborhood, *f.locality, *f.same_subject)}
        asked |= {p for f in bench.facts for p in f.paraphrases} | set(filled(bench.bystanders))
        pool = bench.testbed.untouched(bench.facts, 4 * (n_unrelated + len(asked)), seed + 1000)
        edited = {f.subject for f in bench.facts}
        unrelated = [p for p in filled([s for s in pool if s[1] not in edited]) if p not in asked]
        timed = filled(bench.bystanders[:n_timed])
        return cls(
            bench, scored, axes, bench.testbed.held_out(n_texts, seed), bench.bystanders,
            unrelated[:n_unrelated], timed, bench.testbed.background(bench.facts, n_background, seed),
            Baseline.of(bench.lm, scored, axes, protocols=("easyedit",)),
        )  # fmt: skip

    def take(self) -> pd.DataFrame:
        """Rows of the model as it is now: protocol, axis, unit, success (0..1, or nats for log_perplexity).

        unit is the fact (of a probe), the statement or the text. Success of recall: the answer and its full stop
        are generated.
        """
        lm, tables = self.bench.lm, []
        for protocol in PROTOCOLS:
            table = score(lm, self.scored, protocol, self.axes, baseline=self.baseline)
            tables.append(
                table.groupby(["protocol", "axis", "fact_id"], sort=False)["success"].mean().reset_index()
            )
        for axis, values in (
            ("recall", recall(lm, self.statements, stop=self.bench.stop)),
            ("log_perplexity", text_perplexity(lm, self.texts)),
        ):
            ids = [str(i) for i in range(len(values))]
            tables.append(
                pd.DataFrame({"protocol": "ability", "axis": axis, "fact_id": ids, "success": values})
            )
        return pd.concat(tables, ignore_index=True).rename(columns={"fact_id": "unit"})


def make_method(
    bench: Bench,
    name: str,
    background: Sequence[str],
    networks: dict[str, Hypernetwork],
    given: dict[str, Any],
):
    """A fresh editor of an arm on the bench's model, which optimises its own targets. given: over its options."""
    if arm_named(name).needs == "moments":
        return bench.editor(name, shared=False, **given)
    return make_arm(bench.lm, name, given=given, background=background, networks=networks)


def filled(statements: Sequence[tuple[str, str, str]]) -> list[str]:
    """Prompts of (template, subject, answer)."""
    return [template.replace("{}", subject) for template, subject, _ in statements]


def calibrate(editor, prompts: Sequence[str], rate: float) -> float:
    """Set the threshold of a MEMOIR editor so that at most `rate` of unrelated prompts use the memory as it is now.

    The rule of the routing page (`memory.calibration.from_data`); returns the threshold.
    """
    found = from_data(editor.look_up(prompts).overlap.numpy(), rate)
    editor.config = dataclasses.replace(editor.config, threshold=found.threshold)
    return found.threshold


def bytes_kept(editor) -> tuple[float, float]:
    """(beside the model when it answers, besides that for the next edit), bytes."""
    if hasattr(editor, "n_bytes"):
        return float(editor.n_bytes), 0.0
    tensors = editor.history()[1].values()
    return 0.0, float(sum(t.numel() * t.element_size() for t in tensors))


def _forward(exam: Examination) -> float:
    """Processor seconds of a forward pass over the timed prompts, with whatever is attached to the model now."""
    return inference_seconds(exam.bench.lm, exam.timed, 9, clock=time.process_time)


def run_method(
    exam: Examination, name: str, regime: str, *, batch: int, make: Callable[[], Any], rate: float = 0.05
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Edit all facts of the bench with one method, take the examination after the last edit, restore.

    regime: "once" (one call) or "stream" (calls of `batch` facts).   make: gives the editor; called on the unedited
    model.   rate: false positives that MEMOIR's calibrated threshold may let through.
    Returns rows of `Examination.take` and the cost: processor seconds per edit, peak (bytes the process grew by while
    editing), beside, kept (see `bytes_kept`), overhead (extra time of a forward pass), threshold (of MEMOIR).
    """
    if regime not in REGIMES:
        raise ConfigError(f"regime = {regime!r}; choose from {', '.join(REGIMES)}")
    bench = exam.bench
    if name == "unedited":
        return exam.take(), {}
    editor = make()
    cost: dict[str, float] = {}
    before = _forward(exam)
    try:
        with peak_memory(cost):
            start = time.process_time()
            edit_stream(editor, bench.facts, len(bench.facts) if regime == "once" else batch)
            cost["seconds"] = (time.process_time() - start) / len(bench.facts)
        if name == "memoir":
            cost["threshold"] = calibrate(editor, exam.unrelated, rate)
        cost["beside"], cost["kept"] = bytes_kept(editor)
        cost["overhead"] = _forward(exam) / before - 1
        return exam.take(), cost
    finally:
        editor.restore()


def run_all(
    exam: Examination,
    names: Sequence[str],
    seed: int,
    *,
    batch: int,
    networks=None,
    options=None,
    rate: float = 0.05,
    folder: Path | None = None,
    regimes: Sequence[str] = REGIMES,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every method in both regimes on one bench: rows and costs with columns method, regime, seed.

    What equals another cell exactly (`Method.at_once`) is not run twice: its rows are copied, if the other cell is
    among the methods, and marked in the costs' column `equals`.   folder: each finished cell is kept there, and
    found again by an interrupted run.   say: told what starts.
    """
    rows, costs = [], []
    done: dict[tuple[str, str], tuple[pd.DataFrame, dict[str, float]]] = {}
    for regime in sorted(regimes, key=("stream", "once").index):  # the stream first: "once" may equal it
        for name in names:
            twin = twin_of(name, regime, done)
            if twin is not None:
                table, cost = done[twin]
                cost = {**cost, "equals": " ".join(twin)}
            else:
                say(f"seed {seed}, {regime}, {arm_named(name).label}")

                def work(name=name, regime=regime):
                    return run_method(
                        exam, name, regime, batch=batch, rate=rate,
                        make=lambda: make_method(
                            exam.bench, name, exam.background, networks or {}, (options or {}).get(name, {})
                        ),
                    )  # fmt: skip

                table, cost = kept(None if folder is None else folder / f"{seed}-{regime}-{name}", work)
            done[name, regime] = table, cost
            rows.append(table.assign(method=name, regime=regime, seed=seed))
            costs.append({"method": name, "regime": regime, "seed": seed, "equals": "", **cost})
    return pd.concat(rows, ignore_index=True), pd.DataFrame(costs)


def trained(
    lm: LM, records: Sequence[EditRecord], method: str, *, seed: int, folder: Path | None = None, **options
) -> tuple[Hypernetwork, float]:
    """A hypernetwork (`horse.bench.train` with these options) and the processor seconds of its training.

    folder: where it is kept, and found again by an interrupted run.
    """
    path = None if folder is None else user_path(folder) / f"{seed}-{method}.safetensors"
    clock = None if path is None else path.with_suffix(".json")
    if clock is not None and clock.exists():  # written last
        return load_hypernetwork(path, lm), json.loads(clock.read_text())
    start = time.process_time()
    net = train(lm, records, method, seed=seed, **options).net
    seconds = time.process_time() - start
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        net.save(path)
        clock.write_text(json.dumps(seconds))
    return net, seconds


def twin_of(name: str, regime: str, done) -> tuple[str, str] | None:
    """The finished cell (method, regime) that this one equals exactly, or None: it has to be run."""
    if name == "unedited":
        other = ("unedited", "stream")
    elif regime == "once" and arm_named(name).at_once == "stream":
        other = (name, "stream")
    elif regime == "once" and arm_named(name).at_once:
        other = (arm_named(name).at_once, "once")
    else:
        return None
    return other if other in done else None


def kept(stem: Path | None, work: Callable[[], tuple[pd.DataFrame, dict]]) -> tuple[pd.DataFrame, dict]:
    """The result of work(), from the files of an earlier run if they are there."""
    if stem is None:
        return work()
    table_file, cost_file = Path(f"{stem}.csv"), Path(f"{stem}.json")
    if cost_file.exists():  # written last, so the table is whole
        return pd.read_csv(table_file, dtype={"unit": str}), json.loads(cost_file.read_text())
    table, cost = work()
    stem.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(table_file, index=False)
    cost_file.write_text(json.dumps(cost))
    return table, cost
