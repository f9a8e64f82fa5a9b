"""CounterFact and MultiCounterFact (Meng et al. 2022, 2023), and EasyEdit's flat form of it.

Official record: case_id, pararel_idx, requested_rewrite {prompt, relation_id, target_new {str, id},
target_true {str, id}, subject}, paraphrase_prompts, neighborhood_prompts, attribute_prompts,
generation_prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..base.errors import DataError
from ..base.paths import user_path
from ..models.facts import Fact, Probe
from .base import Corpus, Record, read, read_json
from .fetch import fetch


def load(
    path: str | Path | None = None,
    *,
    multi: bool = False,
    form: str = "rome",
    snippets: str | Path | None = None,
    limit: int | None = None,
    on_error: str = "raise",
) -> Corpus:
    """Facts of a CounterFact file, in file order.

    path:     the file; None fetches counterfact.json (multi: multi_counterfact.json, whose edits can
              coexist).
    form:     "rome" (official) or "easyedit" (prompt with the subject filled in, target_new, ground_truth,
              rephrase_prompt, locality_prompt, locality_ground_truth).
    snippets: attribute_snippets.json; fills `Fact.reference` with the texts about subjects that have the new
              object (consistency score). The official file takes several GB of memory.
    limit, on_error: see `base.read`. Raises DataError.

    The answer of a neighbourhood probe is target_true. Attribute prompts (other subjects whose true object is
    target_new) are in no table of the papers; they are kept in `meta` as a JSON list.
    """
    if form not in ("rome", "easyedit"):
        raise DataError(f"form={form!r}; CounterFact is read in the forms 'rome' and 'easyedit'")
    if form == "easyedit" and (multi or snippets):
        raise DataError(
            "EasyEdit's form has neither relation ids nor a multi version; drop `multi` and `snippets`"
        )
    if path is None:
        path = fetch(
            "counterfact_edit" if form == "easyedit" else "multi_counterfact" if multi else "counterfact"
        )
    texts = None if snippets is None else load_snippets(snippets)

    def parse(record: Record) -> Fact:
        fact = _rome(record) if form == "rome" else _easyedit(record)
        if fact.target == fact.target_true:
            record.note("new object equals the true object")
        if texts is not None:
            ids = dict(fact.meta)
            found = texts.get((fact.relation, ids.get("target_new_id")), ())
            if not found:
                record.note("no attribute snippet for relation and new object")
            fact = fact.replace(reference=found)
        return fact

    return read("counterfact", path, parse, form=form, limit=limit, on_error=on_error)


def load_snippets(path: str | Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """{(relation id, object id): reference texts} from attribute_snippets.json. Raises DataError."""
    path = user_path(path)
    rows, _ = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path.name}: expected a JSON list of {{relation_id, target_id, samples}}")
    found: dict[tuple[str, str], list[str]] = {}
    for i, row in enumerate(rows):
        try:
            found.setdefault((row["relation_id"], row["target_id"]), []).extend(
                s["text"] for s in row["samples"]
            )
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path.name} record {i}: needs relation_id, target_id and samples with a text ({error!r})"
            ) from error
    return {key: tuple(texts) for key, texts in found.items()}


def _rome(record: Record) -> Fact:
    edit = "requested_rewrite."
    relation = record.text(edit + "relation_id", None)
    true = record.text(edit + "target_true.str")
    meta = {
        "pararel_idx": record.get("pararel_idx", None),
        "target_new_id": record.get(edit + "target_new.id", None),
        "target_true_id": record.get(edit + "target_true.id", None),
    }
    attribute = record.texts("attribute_prompts", ())
    if attribute:
        meta["attribute_prompts"] = json.dumps(attribute, ensure_ascii=False)
    return Fact(
        prompt=record.template(edit + "prompt"),
        subject=record.text(edit + "subject"),
        target=record.text(edit + "target_new.str"),
        target_true=true,
        paraphrases=record.texts("paraphrase_prompts"),
        neighborhood=tuple(Probe(p, true, kind=relation or "") for p in record.texts("neighborhood_prompts")),
        generation=record.texts("generation_prompts", ()),
        relation=relation,
        case_id=str(record.get("case_id")),
        meta=tuple(sorted((k, str(v)) for k, v in meta.items() if v is not None)),
    )


def _easyedit(record: Record) -> Fact:
    prompt, subject = record.split("prompt", record.text("subject"))
    rephrase = record.first_text("rephrase_prompt", None)
    locality = record.first_text("locality_prompt", None)
    return Fact(
        prompt=prompt,
        subject=subject,
        target=record.text("target_new"),
        target_true=record.first_text("ground_truth", None),
        paraphrases=(rephrase,) if rephrase else (),
        locality=(Probe(locality, record.first_text("locality_ground_truth")),) if locality else (),
        case_id=str(record.get("case_id", record.index)),
    )
