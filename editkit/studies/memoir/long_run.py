"""One long stream in a MEMOIR memory: what each edit wrote, and what is left of it later.

Without decay the memory after T edits is the sum of what they wrote, W = sum_j dW_j. The released weight decay
multiplies all of W by 1 - lr * decay at every step of every later edit, so that of edit j

    (1 - lr * decay)^(steps made after edit j)                                                        (predicted)

is left. `kept` measures it: the share of dW_j in W by projection, <W, dW_j> / <dW_j, dW_j>. Later edits write into
the same columns, so that the measured share scatters around the prediction, with and without decay.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...base.device import synchronize
from ...base.errors import RequestError
from ...base.paths import user_path
from ...methods.memory.calibration import Calibration
from ...methods.memory.memoir import Memoir
from ...models.facts import Fact
from ..testbed import Testbed
from .data import question_streams
from .mask_study import probes
from .settings import calibrate


def long_stream(bed: Testbed, n: int, seed: int, *, n_protected: int = 2, n_background: int = 100):
    """(facts, background, number from the world): edits of the world as far as it goes, then counterfactual ones of the
    CLaRE corpus, which has no rephrases and no protected probes.

    Raises RequestError if both together have fewer than n edits, DataError if the corpus is needed and not at hand.
    """
    from ...corpora.world.records import choose_edits

    world = bed.world
    room = n
    try:
        choose_edits(world, n, seed)
    except RequestError:
        room = _most(world, seed, n)
    streams = question_streams(
        bed, room, [seed], n_background=n_background, n_paraphrases=1, n_protected=n_protected
    )
    facts, background = streams[seed]
    if room < n:
        from ...corpora import clare

        more = clare.counterfactuals(clare.unique_answers(clare.load()), seed=seed)
        order = np.random.default_rng([seed, 5]).permutation(len(more))
        taken = {f.text for f in facts}
        more = [more[i] for i in order if more[i].text not in taken]
        if room + len(more) < n:
            raise RequestError(f"{n} edits wanted; the world gives {room}, the corpus {len(more)}")
        facts = [*facts, *more[: n - room]]
    return facts, background, room


def _most(world, seed: int, n: int) -> int:
    """Largest number of edits, to 100, that the world can take together."""
    from ...corpora.world.records import choose_edits

    while n > 100:
        n -= n % 100 or 100
        try:
            choose_edits(world, n, seed)
            return n
        except RequestError:
            continue
    return n


def calibrate_within(
    bed: Testbed, seed: int, n: int, *, rate: float, n_background: int, **options
) -> Calibration:
    """`settings.calibrate` for n stored edits on the long stream of a held-out seed."""
    facts, background, _ = long_stream(bed, max(n, 200), seed, n_background=n_background)
    return calibrate(bed.lm, facts, background, n=n, rate=rate, **options)


def prompt_overlaps(memory: Memoir, facts: Sequence[Fact]) -> dict[str, np.ndarray]:
    """Overlap with the nearest stored mask of the facts' rephrases, unrelated facts and neighbors, (n,) each."""
    frame = probes(facts)
    found = {}
    for group in ("rephrase", "unrelated fact", "neighbor"):
        prompts = list(dict.fromkeys(frame[frame["group"] == group]["prompt"]))
        if prompts:
            found[group] = memory.look_up(prompts).overlap.numpy()
    return found


class Diary:
    """A MEMOIR editor that notes the steps of every edit and keeps what sampled edits wrote.

    editor: Memoir.   folder: where notes and increments lie, so that an interrupted stream finds them again.
    sampled: positions of the edits whose increment is kept.
    """

    def __init__(self, editor: Memoir, folder: Path, sampled: Sequence[int] = ()) -> None:
        self.editor, self.folder, self.sampled = editor, user_path(folder), set(sampled)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.steps: list[int] = []

    def __getattr__(self, name: str):
        return getattr(self.editor, name)

    def edit(self, facts: Sequence[Fact]):
        """As the editor's; facts has one fact."""
        editor, at = self.editor, self.editor.n_facts
        before = editor.weight.clone() if at in self.sampled else None
        updates, record = [0], editor.record

        def counted(name: str, value: Tensor) -> None:
            updates[0] += name == "weight"  # one per step that was taken; the last evaluation takes none
            record(name, value)

        editor.record = counted
        try:
            done = editor.edit(facts)
        finally:
            editor.record = record
        self.steps = [*self.steps[:at], updates[0]]
        if before is not None:
            # what was there before has shrunk during these steps, too; that is not what the edit wrote
            wrote = editor.weight - self.shrink ** updates[0] * before
            mask = editor.masks.masks(torch.tensor(done.metadata["masks"]))[0]
            save_file({"columns": mask.nonzero()[:, 0].cpu(), "wrote": wrote[:, mask].cpu().contiguous()},
                      self.folder / f"{at}.safetensors")  # fmt: skip
        return done

    @property
    def shrink(self) -> float:
        """Factor by which one step scales what other edits wrote."""
        return 1 - self.editor.config.lr * self.editor.config.weight_decay

    def save(self, path: Path) -> Path:
        (self.folder / "steps.json").write_text(json.dumps(self.steps))
        return self.editor.save(path)

    def load(self, path: Path) -> None:
        self.editor.load(path)
        self.steps = json.loads((self.folder / "steps.json").read_text())[: self.editor.n_facts]

    def kept(self) -> pd.DataFrame:
        """Per sampled edit: position, age (edits after it), steps_after, predicted and measured share."""
        rows, total = [], np.cumsum(self.steps)
        for at in sorted(i for i in self.sampled if i < len(self.steps)):
            found = load_file(self.folder / f"{at}.safetensors")
            after = int(total[-1] - total[at])
            now = self.editor.weight[:, found["columns"].to(self.editor.weight.device)].cpu()
            rows.append({
                "position": at, "age": len(self.steps) - 1 - at, "steps_after": after, "predicted": self.shrink**after,
                "measured": float((now * found["wrote"]).sum() / (found["wrote"] ** 2).sum()),
            })  # fmt: skip
        return pd.DataFrame(rows)


@torch.no_grad()
def look_up_seconds(memory: Memoir, features: Tensor, repeats: int = 5) -> float:
    """Seconds per query of hashing mean features (n, d) and finding their nearest masks (median of several)."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        memory.masks.best(memory.hash(features))
        synchronize(features.device)
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:])) / len(features)
