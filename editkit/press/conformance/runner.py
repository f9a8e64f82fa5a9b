"""Find recorded cases below a folder, run the adapter of each and report."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from ...base.errors import DataError
from .case import MODELS, CannotHandle, Case, Comparison, registered

Verdict = Literal["passed", "failed", "skipped"]
_NOT_ADAPTERS = {"case", "runner", "command"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of one case folder. reason: why skipped, or the message of the exception that made it fail."""

    case: str
    verdict: Verdict
    comparisons: tuple[Comparison, ...] = ()
    reason: str = ""
    unused: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def worst(self) -> Comparison | None:
        """The comparison with the largest deviation relative to its tolerance."""
        return max(self.comparisons, key=lambda c: (c.severity, c.deviation), default=None)


def discover() -> None:
    """Import every module of this package, so that all adapters are registered."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in _NOT_ADAPTERS:
            importlib.import_module(f"{__package__}.{module.name}")


def _models_dir(folder: Path) -> Path | None:
    """The nearest `models` folder: in `folder` itself or in one of its parents."""
    folder, real = folder.absolute(), folder.resolve()
    for parent in (folder, *folder.parents, *real.parents):
        if (parent / MODELS).is_dir():
            return parent / MODELS
    return None


def find_cases(root: Path | str) -> list[Path]:
    """Case folders at or below `root`, sorted: every folder with case.json, or with arrays.npz but no
    case.json.

    Raises DataError if `root` is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give a folder with recorded cases (case.json below it)")
    found = {path.parent for name in ("case.json", "arrays.npz") for path in root.rglob(name)}
    return sorted(found)


def run_case(folder: Path | str, models_dir: Path | str | None = None, name: str | None = None) -> Outcome:
    """Run one case folder. Never raises for a bad case: that is what the verdict says."""
    discover()
    folder = Path(folder)
    name = str(folder) if name is None else name
    start, case = time.perf_counter(), None
    try:
        case = Case(folder, models_dir or _models_dir(folder))
        run_adapter = registered().get(case.method)
        if run_adapter is None:
            raise CannotHandle(f"no adapter for method {case.method!r}")
        comparisons = tuple(run_adapter(case))
        if not comparisons:
            raise CannotHandle("the adapter found nothing to compare")
        verdict: Verdict = "passed" if all(c.passed for c in comparisons) else "failed"
        return Outcome(
            name, verdict, comparisons, "", tuple(case.unused_arrays()), time.perf_counter() - start
        )
    except CannotHandle as reason:
        return Outcome(name, "skipped", reason=str(reason), seconds=time.perf_counter() - start)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        return Outcome(name, "failed", reason=message, seconds=time.perf_counter() - start)
    finally:
        if case is not None:
            case.arrays.close()


def run(root: Path | str) -> Iterable[Outcome]:
    """Run every case at or below `root` and yield the outcomes in order of their folder names."""
    root = Path(root)
    for folder in find_cases(root):
        relative = folder.relative_to(root)
        yield run_case(folder, name=str(relative) if relative.parts else folder.resolve().name)


def format_row(outcome: Outcome, width: int) -> str:
    """One line of the table: case, largest deviation and where, its tolerance, number of comparisons,
    verdict.
    """
    worst = outcome.worst
    if worst is None or outcome.verdict == "skipped":
        detail = f"{'-':>10}  {'-':>9}  {'-':>5}  {outcome.verdict:<7}  {outcome.reason}"
    else:
        detail = (
            f"{worst.deviation:>10.2e}  {worst.tolerance:>9.1e}  {len(outcome.comparisons):>5}  "
            f"{outcome.verdict:<7}  {worst.name}" + (f" ({worst.note})" if worst.note else "")
        )
    return f"{outcome.case:<{width}}  {detail}".rstrip()


def format_header(width: int) -> str:
    head = f"{'case':<{width}}  {'deviation':>10}  {'tolerance':>9}  {'parts':>5}  {'verdict':<7}"
    return f"{head}  largest at / reason"


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """The closing table: agreed, not compared (with the reason) and failed, with the farthest of each."""
    lines = []
    for verdict, title in (("passed", "agreed"), ("skipped", "not compared"), ("failed", "failed")):
        found = [o for o in outcomes if o.verdict == verdict]
        worst = max((o for o in found if o.worst), key=lambda o: o.worst.severity, default=None)
        detail = "" if worst is None else f"  farthest: {worst.case}, {worst.worst.name}"
        if worst is not None:
            detail += f" ({worst.worst.deviation:.1e} of {worst.worst.tolerance:.1e} allowed)"
        lines.append(f"{title:<15}{len(found):>4}{detail}".rstrip())
        if verdict != "passed":
            lines += [f"    {o.case}: {o.reason}" for o in found if o.reason]
    return lines


def totals(outcomes: Sequence[Outcome]) -> str:
    """The last line: `N passed, M failed, K skipped`."""
    count = {v: sum(o.verdict == v for o in outcomes) for v in ("passed", "failed", "skipped")}
    return f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped"
