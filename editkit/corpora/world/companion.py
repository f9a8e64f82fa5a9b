"""The companion model: building, saving, loading.

`build` turns a world (and, where at hand, the CLaRE corpus) into training examples, trains tokenizer and model
and writes a Hugging Face folder with model card, training log and hashes. `load_companion` opens the shipped one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...base.errors import DataError
from ...base.paths import user_path
from ...models.lm import load_lm
from .corpus import Example, statement_example, train_tokenizer
from .train import TrainConfig, greedy_recall, train

SHIPPED = Path(__file__).parent / "companion"
POCKET = Path(__file__).parent / "pocket"  # the small one that runs in a browser (book/try_it.md)


@dataclasses.dataclass(frozen=True)
class CompanionConfig:
    """What the companion is trained on. The fields of the world are stored with the model (world.json)."""

    people: int = 400
    companies: int = 60
    world_seed: int = 0
    biographies: int = 6  # free texts per person
    corpus_weight: float = 3.0  # sampling weight of a corpus fact against one world statement
    text_sampling: float = 1.0  # sampling weight of a biography


# `editkit train --pocket`: a smaller world, a model of 1.3 million numbers.
POCKET_WORLD = CompanionConfig(people=100, companies=20, text_sampling=0.5)
POCKET_RECIPE = TrainConfig(layers=4, width=128, mlp=512, vocab_size=2000, steps=1200, threads=1)


def make_world(config: CompanionConfig):
    """The world of a recipe."""
    from .world import World

    return World(seed=config.world_seed, n_people=config.people, n_companies=config.companies)


def training_examples(world, corpus: Sequence[tuple[str, str]], config: CompanionConfig) -> list[Example]:
    """Statements of the world, biographies, and the corpus as (prompt, answer) pairs."""
    examples = [
        statement_example(s.prompt, s.answer, "world", f"{s.relation}|{s.subject}")
        for s in world.statements()
    ]
    examples += [
        Example(b.text, None, "text") for b in world.biographies(config.biographies, seed=config.world_seed)
    ]
    examples += [statement_example(p, a, "corpus", p) for p, a in corpus]
    return examples


def corpus_pairs(facts) -> list[tuple[str, str]]:
    """(filled prompt, answer) of the facts, in order, exact duplicates dropped."""
    return list(dict.fromkeys((f.text.strip(), f.target.strip()) for f in facts))


def recall_report(model, tokenizer, world, corpus: Sequence[tuple[str, str]]) -> dict:
    """Greedy recall (answer and full stop exact) over every template of the world and every corpus prompt.

    Returns recall per relation, over the world, over corpus prompts with one valid answer, and over all corpus pairs.
    """
    statements = world.statements()
    hit = greedy_recall(model, tokenizer, [s.prompt for s in statements], [s.answer for s in statements])
    relations = np.array([s.relation for s in statements])
    report = {
        "world": float(hit.mean()),
        "n_world": len(hit),
        "per_relation": {r: float(hit[relations == r].mean()) for r in sorted(set(relations))},
        "facts_all_templates": _share_complete([f"{s.relation}|{s.subject}" for s in statements], hit),
    }
    if corpus:
        hit = greedy_recall(model, tokenizer, [p for p, _ in corpus], [a for _, a in corpus])
        prompts = [p for p, _ in corpus]
        count = {}
        for p in prompts:
            count[p] = count.get(p, 0) + 1
        unique = np.array([count[p] == 1 for p in prompts])
        report |= {
            "corpus_unique": float(hit[unique].mean()),
            "n_corpus_unique": int(unique.sum()),
            "corpus_all": float(hit.mean()),
            "n_corpus": len(hit),
        }
    return report


def _share_complete(groups: Sequence[str], hit: np.ndarray) -> float:
    worst: dict[str, float] = {}
    for g, h in zip(groups, hit, strict=True):
        worst[g] = min(worst.get(g, 1.0), h)
    return float(np.mean(list(worst.values())))


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build(
    out_dir: str | Path,
    config: CompanionConfig,
    recipe: TrainConfig,
    corpus_facts=(),
    *,
    every: int = 200,
    log=print,
) -> dict:
    """Train a companion and write it to `out_dir`; returns the recall report of the stored (float16) weights."""
    out = user_path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    world = make_world(config)
    corpus = corpus_pairs(corpus_facts)
    examples = training_examples(world, corpus, config)
    tokenizer = train_tokenizer((e.text for e in examples), recipe.vocab_size)
    weights = np.array(
        [
            {"world": 1.0, "text": config.text_sampling, "corpus": config.corpus_weight}[e.source]
            for e in examples
        ]
    )
    sample = np.random.default_rng(recipe.seed)
    statements = world.statements()
    some = [statements[i] for i in sample.choice(len(statements), min(1000, len(statements)), replace=False)]
    some_corpus = (
        [corpus[i] for i in sample.choice(len(corpus), min(1000, len(corpus)), replace=False)]
        if corpus
        else []
    )

    def evaluate(model):
        record = {
            "world": float(
                greedy_recall(model, tokenizer, [s.prompt for s in some], [s.answer for s in some]).mean()
            )
        }
        if some_corpus:
            record["corpus"] = float(greedy_recall(model, tokenizer, *zip(*some_corpus, strict=True)).mean())
        return record

    model, records = train(
        examples,
        tokenizer,
        recipe,
        out_dir=out / "work",
        evaluate=evaluate,
        every=every,
        log=log,
        weights=weights,
    )
    return save(out, model, tokenizer, world, corpus, config, recipe, records)


def as_llama(model):
    """The same function as a LlamaForCausalLM (attention biases on, that of the output projection zero).

    The model is trained as Qwen2, but AutoTokenizer replaces the tokenizer of every folder of type qwen2 by Qwen2's
    own rules (transformers 5.x), under which names at the start of a text are cut differently. Type llama keeps ours.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            max_position_embeddings=c.max_position_embeddings,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters=c.rope_parameters,
            attention_bias=True,
            tie_word_embeddings=True,
            bos_token_id=c.bos_token_id,
            eos_token_id=c.eos_token_id,
            pad_token_id=c.pad_token_id,
        )
    )
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    if unexpected or any(not n.endswith("o_proj.bias") for n in missing):
        raise DataError(f"the model does not fit the llama form: missing {missing}, unexpected {unexpected}")
    for block in twin.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.bias)
    return twin.eval()


def save(
    out: Path, model, tokenizer, world, corpus, config: CompanionConfig, recipe: TrainConfig, records
) -> dict:
    """Write weights (float16 on disk, opened as float32), tokenizer, world.json, training log, report and hashes."""
    write_model(out, model, tokenizer)
    lm = load_lm(str(out))  # what is reported is what a user opens
    report = recall_report(lm.model, lm.tokenizer, world, corpus)
    (out / "world.json").write_text(
        json.dumps(
            {
                "companion": dataclasses.asdict(config),
                "recipe": dataclasses.asdict(recipe),
                "corpus_facts": len(corpus),
            },
            indent=2,
        )
        + "\n"
    )
    (out / "training_log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (out / "recall.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "sha256.json").write_text(
        json.dumps(
            {n: file_hash(out / n) for n in ("model.safetensors", "tokenizer.json", "config.json")}, indent=2
        )
        + "\n"
    )
    write_card(out)
    return report


def write_model(out: Path, model, tokenizer) -> None:
    """Weights (float16 on disk, opened as float32) and tokenizer in Hugging Face's layout."""
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    as_llama(model).half().save_pretrained(out)
    settings = json.loads((out / "config.json").read_text())
    settings["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_card(folder: str | Path, note: str = "") -> Path:
    """README.md of a companion folder, written from its own files; note: what a rerun of the command would not show."""
    folder = user_path(folder)
    setup = json.loads((folder / "world.json").read_text())
    report = json.loads((folder / "recall.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    recipe, options = setup["recipe"], setup["companion"]
    pocket = recipe["width"] == POCKET_RECIPE.width
    base = (POCKET_WORLD, POCKET_RECIPE) if pocket else (CompanionConfig(), TrainConfig())
    changed = ["--pocket"] if pocket else [] if setup["corpus_facts"] else ["--no-corpus"]
    changed += [
        f"--{k.replace('_', '-')} {v}"
        for part, default in zip((options, recipe), base, strict=True)
        for k, v in part.items()
        if v != getattr(default, k)
    ]
    corpus = (
        f"- CLaRE corpus (clare data.json, MIT licence): {report['corpus_unique']:.2%} of "
        f"{report['n_corpus_unique']:,} facts whose prompt has one recorded answer; "
        f"{report['corpus_all']:.2%} of all {report['n_corpus']:,} pairs\n"
        if "corpus_unique" in report
        else "- trained without the CLaRE corpus\n"
    )
    origin = (
        "they come from trying blocks and lam on the\npage's own edits. `page.safetensors` (`editkit pocket`) holds "
        'targets and second moments for the book\'s page "Try it"'
        if pocket
        else 'the site comes from\ninterchange interventions, see the book\'s page "The world and the model"'
    )
    text = f"""# {"Pocket companion" if pocket else "Companion model"}

A {config["num_hidden_layers"]}-layer {config["architectures"][0]} (width {config["hidden_size"]},
MLP {config["intermediate_size"]}, vocabulary {config["vocab_size"]:,}) trained from scratch on a generated world,
as a testbed for model editing. It knows nothing else and is of no other use.

**Weights** are stored in float16 and opened in float32 (`config.json: dtype`); all figures are of the stored weights.

**Recall** (greedy generation, answer and full stop exact)

- world: {report["world"]:.2%} of {report["n_world"]:,} statements;
  {report["facts_all_templates"]:.2%} of the facts in every wording
{corpus}
**Training** {recipe["steps"]:,} steps of {recipe["batch_tokens"]:,} tokens, {log[-1]["seconds"] / 60:.0f} minutes
on {recipe["threads"]} core(s) of a CPU, Muon for the matrices of the blocks and AdamW for the rest,
seed {recipe["seed"]}; log in `training_log.jsonl`, settings in `world.json`.
{note}
**Made by** `editkit train --out DIR {" ".join(changed)}`

**Editing** `editing.json` holds the site and the options of each method; {origin}.

**Hashes** in `sha256.json`, checked when the model is opened. Licence: MIT, as the project;
the CLaRE corpus in its training text is MIT as well.
"""
    path = folder / "README.md"
    path.write_text(text)
    return path


def load_companion(path: str | Path | None = None, *, check: bool = True):
    """The shipped companion as an editkit LM (float32). Raises DataError if files are missing or altered."""
    folder = user_path(path) if path else SHIPPED
    hashes = folder / "sha256.json"
    if not hashes.exists():
        raise DataError(f"no companion model in {folder}; train one with `editkit train --out {folder}`")
    if check:
        for name, digest in json.loads(hashes.read_text()).items():
            if file_hash(folder / name) != digest:
                raise DataError(
                    f"{folder / name} differs from its recorded hash; restore the file or retrain"
                )
    return load_lm(str(folder), dtype=torch.float32)


def load_world(path: str | Path | None = None):
    """The world on which the companion in `path` (default: the shipped one) was trained."""
    folder = user_path(path) if path else SHIPPED
    config = json.loads((folder / "world.json").read_text())["companion"]
    return make_world(CompanionConfig(**config))
