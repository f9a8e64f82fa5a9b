"""The page "Try it": what a browser needs of the pocket companion, and `editkit pocket`, which makes its tables.

The pocket companion (`editkit train --pocket`) lies in corpora/world/pocket like any companion. Beside it lies
page.safetensors, made once: targets z of the page's edits and a factor of each layer's second moment, both in float16.
The editor in the browser and the tests in Python use these rounded numbers, so that both compute the same.

The book writes the page's scripts from these files at every build (`write_page`): plain script files, because neither
fetch nor modules work from a folder.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..base.errors import DataError
from ..corpora.world.companion import POCKET, file_hash, load_companion, load_world
from ..corpora.world.records import edit_facts
from ..corpora.world.world import World
from ..locate.moments import second_moment
from ..locate.targets import TargetConfig, optimize_targets
from ..models.facts import Fact

TABLE = "page.safetensors"
N_EDITS, N_CHOICES, N_UNTOUCHED, SEED = 300, 3, 100, 0
SITES = (1, 2)  # blocks that the page may edit; targets belong to the last
PARTS = 8  # script files of the weights: each that has arrived moves the progress bar
_FORMAT = "editkit-pocket-page-1"


@dataclasses.dataclass(frozen=True)
class PageFacts:
    """What the page edits and watches.

    facts:     requests whose first new objects can all hold at once (`corpora.world.records.edit_facts`).
    choices:   per fact its new objects, the first of which is the request's.
    untouched: (prompt, answer) of facts that none of these edits may change.
    """

    facts: tuple[Fact, ...]
    choices: tuple[tuple[str, ...], ...]
    untouched: tuple[tuple[str, str], ...]

    def requests(self) -> list[Fact]:
        """One request per fact and choice, fact-major: the columns of the table of targets."""
        return [
            f.replace(target=new) for f, news in zip(self.facts, self.choices, strict=True) for new in news
        ]

    def digest(self) -> str:
        """sha256 of all of it, kept with the tables."""
        content = [[f.text for f in self.facts], self.choices, self.untouched]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def page_facts(world: World) -> PageFacts:
    """The facts of the page; a function of the world."""
    facts = edit_facts(world, N_EDITS, SEED, n_paraphrases=1, n_neighbors=1, n_locality=1, n_same_subject=1)
    rng = np.random.default_rng([SEED, world.seed, 5])
    choices = []
    for f in facts:
        own = {*world.attributes(f.relation, f.subject).values(), f.target, f.subject}
        pool = [o for o in world.objects(f.relation) if o not in own]
        more = rng.choice(pool, N_CHOICES - 1, replace=False).tolist()
        choices.append((f.target, *more))
    kinds = [[(p.prompt, p.answer) for f in facts for p in getattr(f, kind)]
             for kind in ("same_subject", "neighborhood", "locality")]  # fmt: skip
    mixed = dict.fromkeys(pair for row in zip(*kinds, strict=False) for pair in row)
    return PageFacts(tuple(facts), tuple(choices), tuple(list(mixed)[:N_UNTOUCHED]))


def make_table(folder: Path = POCKET) -> Path:
    """Optimise the targets, read the second moments, and write page.safetensors; about half a minute on one core."""
    lm, world = load_companion(folder), load_world(folder)
    page, preset = page_facts(world), json.loads((folder / "editing.json").read_text())
    options = {k.removeprefix("z_"): v for k, v in preset["targets"].items() if k.startswith("z_")}
    token = preset["site"]["token"]
    found = optimize_targets(lm, page.requests(), SITES[-1], TargetConfig(**options), token=token)
    tensors = {"z": found.z.T.half().contiguous()}
    for layer, moment in second_moment(lm, list(SITES), world.corpus_texts()).items():
        # A rounded factor is a factor of some positive matrix; a rounded moment need not be positive.
        L = torch.linalg.cholesky(moment.C)
        tensors[f"moment.{layer}"] = L[tuple(torch.tril_indices(*L.shape))].half()
    meta = {"format": _FORMAT, "model": file_hash(folder / "model.safetensors"), "facts": page.digest()}
    save_file(tensors, folder / TABLE, metadata=meta)
    return folder / TABLE


def load_table(folder: Path = POCKET) -> dict[str, torch.Tensor]:
    """z (facts x choices, m) and C0 (d, d) as "moment.LAYER", float64, of the numbers that the browser gets.

    Raises DataError if the file is missing or was made for another model or other facts.
    """
    path, remedy = folder / TABLE, "make it with `editkit pocket`"
    if not path.exists():
        raise DataError(f"{path} is missing; {remedy}")
    with safe_open(str(path), framework="pt") as file:
        meta = file.metadata() or {}
    wanted = {"format": _FORMAT, "model": file_hash(folder / "model.safetensors"),
              "facts": page_facts(load_world(folder)).digest()}  # fmt: skip
    if meta != wanted:
        wrong = [k for k in wanted if meta.get(k) != wanted[k]]
        raise DataError(f"{path} belongs to another {' and '.join(wrong)}; {remedy}")
    found = load_file(path)
    for layer in SITES:
        packed = found[f"moment.{layer}"].double()
        d = int((2 * len(packed)) ** 0.5)
        L = torch.zeros(d, d, dtype=torch.float64)
        L[tuple(torch.tril_indices(d, d))] = packed
        found[f"moment.{layer}"] = L @ L.T
    return found | {"z": found["z"].double()}


def payload(folder: Path = POCKET) -> tuple[dict, bytes]:
    """(description, float16 numbers) of the page; the description says where each tensor begins and its size."""
    load_table(folder)  # refuses tables of another model
    weights, tables = load_file(folder / "model.safetensors"), load_file(folder / TABLE)
    world, config = load_world(folder), json.loads((folder / "config.json").read_text())
    page, preset = page_facts(world), json.loads((folder / "editing.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocab = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    index, parts, place = {}, [], 0
    for name, tensor in (weights | tables).items():
        parts.append(tensor.half().numpy().astype("<f2").tobytes())
        index[name] = [place, tensor.numel()]
        place += len(parts[-1])
    texts = " ".join(world.corpus_texts())
    description = {
        "config": {
            "layers": config["num_hidden_layers"], "width": config["hidden_size"], "mlp": config["intermediate_size"],
            "heads": config["num_attention_heads"], "vocab": config["vocab_size"], "eps": config["rms_norm_eps"],
            "theta": config["rope_parameters"]["rope_theta"], "positions": config["max_position_embeddings"],
            "sites": SITES,
        },
        "parameters": sum(t.numel() for t in weights.values()),
        "model": file_hash(folder / "model.safetensors"),
        "tokenizer": {"vocab": vocab, "merges": [" ".join(pair) for pair in tokenizer["merges"]]},
        "words": sorted(set(re.findall(r"[^\W_]+", texts))),
        "settings": {"layers": preset["site"]["layers"], "lam": preset["methods"]["memit"]["lam"], "history": True,
                     "batch": 20, "spread": "linear_decay"},
        "facts": [
            {"prompt": f.text, "subject": f.subject, "relation": f.relation, "old": f.target_true, "choices": news,
             "paraphrase": f.paraphrases[0]}
            for f, news in zip(page.facts, page.choices, strict=True)
        ],
        "untouched": page.untouched,
        "tensors": index,
        "bytes": place,
    }  # fmt: skip
    return description, b"".join(parts)


def write_page(out: Path, folder: Path = POCKET) -> list[Path]:
    """Write model.js (description) and model-0.js, model-1.js, ... (numbers, base64) into `out`."""
    description, numbers = payload(folder)
    out.mkdir(parents=True, exist_ok=True)
    step = -(-len(numbers) // PARTS // 3) * 3  # whole base64 groups
    texts = [base64.b64encode(numbers[i : i + step]).decode() for i in range(0, len(numbers), step)]
    description |= {"parts": len(texts)}
    files = {
        "model.js": f"Pocket.describe({json.dumps(description, ensure_ascii=False, separators=(',', ':'))});\n"
    }
    files |= {f"model-{i}.js": f'Pocket.arrive({i},"{text}");\n' for i, text in enumerate(texts)}
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in files]


def add_parser(subparsers) -> None:
    """Register `editkit pocket`."""
    parser = subparsers.add_parser(
        "pocket",
        help="make the tables of the page Try it",
        description="Optimises the targets of the page's edits on the pocket companion and reads its second moments; "
        "needed after `editkit train --pocket`, or when the world or the page's choice of facts changes.",
    )
    parser.add_argument("--folder", type=Path, default=POCKET, help="folder of the pocket companion")
    parser.set_defaults(func=lambda args: print(make_table(args.folder)))
