"""`editkit train`: train a companion model on a world (and the CLaRE corpus where at hand)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from .companion import POCKET_RECIPE, POCKET_WORLD, CompanionConfig, build
from .train import TrainConfig


def add_parser(subparsers) -> None:
    """Register the subcommand; every field of the two recipes is an option."""
    parser = subparsers.add_parser(
        "train",
        help="train a companion model from scratch",
        description="Trains tokenizer and model on the world and the CLaRE corpus, resumes an interrupted training, "
        "and writes a Hugging Face folder with training log, recall report and hashes.",
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="folder of the model (and of its checkpoints)"
    )
    parser.add_argument(
        "--pocket", action="store_true", help="the recipe of the model on the page Try it (about ten minutes)"
    )
    parser.add_argument("--no-corpus", action="store_true", help="train on the world alone")
    parser.add_argument("--every", type=int, default=200, help="steps between evaluations and checkpoints")
    for config in (CompanionConfig, TrainConfig):
        group = parser.add_argument_group(config.__name__)
        for field in dataclasses.fields(config):
            group.add_argument(
                "--" + field.name.replace("_", "-"),
                type=type(field.default),
                help=f"default {field.default}",  # of the recipe: None says that it was not given
            )
    parser.set_defaults(func=run)


def run(args) -> int:
    """Train and print the recall report; returns the exit status."""
    from ...base.errors import DataError
    from .. import clare

    def pick(recipe):
        given = {f.name: getattr(args, f.name) for f in dataclasses.fields(recipe)}
        return dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})

    world, training = (POCKET_WORLD, POCKET_RECIPE) if args.pocket else (CompanionConfig(), TrainConfig())
    facts = ()
    if not (args.no_corpus or args.pocket):
        try:
            facts = clare.load()
        except DataError as error:
            print(f"{error}\nTraining needs the corpus; use --no-corpus to train on the world alone.")
            return 1
    report = build(args.out, pick(world), pick(training), facts, every=args.every)
    print(json.dumps(report, indent=2))
    return 0
