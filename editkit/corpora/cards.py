"""Data set cards: what each corpus is, where it comes from, what is wrong with it and where it is used.

`CARDS[name]` is plain data for the book and for sidecars; `markdown(name)` is the card as a page section.
Counts marked "published" are quoted from papers and repositories; the others were counted by the tests.
"""

from __future__ import annotations

from . import real
from .fetch import REGISTRY

CARDS: dict[str, dict] = {
    "clare": {
        "title": "CLaRE corpus",
        "citation": "Baser et al. 2026, arXiv 2603.19297",
        "files": ["clare"],
        "records": {"facts": 11427},
        "schema": {
            "prompt": "template with one '{}'",
            "subject": "text for the slot",
            "target": "a true object",
        },
        "defects": [
            "265 prompts have several true answers (2 to 14; 841 facts); one target is not the truth there",
            "no counterfactual objects and no relation ids",
            "345 facts repeat subject and object under another template, often a paraphrase",
            "in 112 facts the answer is written in the prompt, in 18 it is the subject",
            "in 16 facts the template continues the name ('{} Islands'): the subject is not the entity",
            "misspelt templates ('univeristy', 'origianl'), kept as published",
            "41 templates have a single fact; sizes range from 1 to 728",
        ],
        "used_in": "entanglement (CLaRE), companion model, ripple measurements",
    },
    "counterfact": {
        "title": "CounterFact and MultiCounterFact",
        "citation": "Meng et al. 2022, arXiv 2202.05262; Meng et al. 2023, arXiv 2210.07229",
        "files": ["counterfact", "multi_counterfact", "attribute_snippets", "counterfact_edit"],
        "records": {"counterfact": 21919, "multi_counterfact": 20877},
        "schema": {
            "case_id, pararel_idx": "integers",
            "requested_rewrite": "prompt with '{}', subject, relation_id, target_new, target_true {str, id}",
            "paraphrase_prompts": "2 full prompts",
            "neighborhood_prompts": "10 full prompts, same relation and true object, other subjects",
            "attribute_prompts": "10 full prompts, subjects whose true object is target_new",
            "generation_prompts": "10 beginnings of free text about the subject",
        },
        "defects": [
            "paraphrases start with unrelated sentences, some of them garbled",
            "CounterFact has edits that contradict each other; use MultiCounterFact for many edits",
            "the reference snippets for the consistency score are a file of 926 MB",
        ],
        "used_in": "efficacy, paraphrase, neighborhood, fluency, consistency",
    },
    "zsre": {
        "title": "zsRE (MEND split)",
        "citation": "Levy et al. 2017, arXiv 1706.04115; Mitchell et al. 2022, arXiv 2110.11309",
        "files": ["zsre_eval", "zsre_train", "zsre_edit"],
        "records": {"zsre_mend_eval": 19086, "zsre_mend_train": 163196},
        "schema": {
            "subject, src, rephrase": "subject, question, its paraphrase",
            "answers": "list; the first is the correct answer",
            "alt, pred": "another answer (EasyEdit's target), a model's prediction",
            "loc, loc_ans": "unrelated question ('nq question: ...') and its answer",
            "cond": "pred >> alt || src",
        },
        "defects": [
            "two readings: ROME writes answers[0], a true fact; EasyEdit writes alt; not comparable",
            "many records about one subject (ten phrasings of one question), so records are not independent",
            "alternative answers of doubtful type, some with a leading blank",
            "locality questions have no question mark; the ROME reading appends one",
        ],
        "used_in": "question answering edits: reliability, generality, locality",
    },
    "selfcheck": {
        "title": "SelfCheckGPT hallucination",
        "citation": "Manakul et al. 2023, arXiv 2303.08896; Hartvigsen et al. 2023, arXiv 2211.11031",
        "files": ["selfcheck_edit", "selfcheck_train"],
        "records": {"edits used in papers": 600},
        "schema": {
            "prompt": "beginning of an article",
            "subject": "its topic",
            "target_new": "the corrected sentence",
            "locality_prompt, locality_ground_truth": "unrelated text and its continuation",
        },
        "defects": [
            "no paraphrases",
            "prompts mention the subject many times; the slot is the first mention",
            "the usual mean of perplexities is ruled by outliers",
        ],
        "used_in": "long-form edits of memory methods: perplexity, locality",
    },
    "temporal": {
        "title": "Temporal (out-of-distribution)",
        "citation": "Wang et al. 2024, arXiv 2405.14768",
        "files": ["temporal_edit", "temporal_train"],
        "records": {"edits used in papers": 75},
        "schema": {
            "prompt, subject, target_new": "beginning of a text, its topic, its continuation",
            "ood_rephrase": "a natural text about the new fact",
            "locality_prompt, locality_ground_truth": "unrelated text and its continuation",
        },
        "defects": ["the released score reads ood_rephrase as a whole and never the target"],
        "used_in": "out-of-distribution generalisation of memory methods",
    },
    "mquake": {
        "title": "MQuAKE",
        "citation": "Zhong et al. 2023, arXiv 2305.14795",
        "files": ["mquake_cf", "mquake_cf_3k", "mquake_cf_3k_v2", "mquake_t"],
        "records": {"MQuAKE-CF": 9218, "MQuAKE-CF-3k": 3000, "MQuAKE-CF-3k-v2": 3000, "MQuAKE-T": 1825},
        "schema": {
            "case_id": "integer",
            "requested_rewrite": "1 to 4 edits in CounterFact's form, each with a question",
            "questions": "3 phrasings of one multi-hop question",
            "answer, answer_alias, new_answer, new_answer_alias": "accepted answers before and after",
            "single_hops, new_single_hops": "both chains: question, cloze, answer, answer_alias",
            "orig": "triples of the chain",
        },
        "defects": [
            "edits of different records conflict in MQuAKE-CF-3k; v2 is resolved",
            "some questions are malformed (reported in the repository's issues)",
        ],
        "used_in": "multi-hop consequences of edits",
    },
    "ripple": {
        "title": "RippleEdits",
        "citation": "Cohen et al. 2024, arXiv 2307.12976",
        "files": ["ripple_recent", "ripple_random", "ripple_popular"],
        "records": {"recent": 1948, "random": 1922, "popular": 885},
        "schema": {
            "example_type": "subset",
            "edit": "prompt (a sentence), subject_id, relation, target_id, previous_fact",
            "Relation_Specificity, Forgetfulness": "tests that must stay",
            "Logical_Generalization, Subject_Aliasing, Compositionality_I and _II": "tests that change",
            "test": "test_queries, test_condition OR/AND, condition_queries",
            "query": "prompt, answers [{value, aliases}], query_type, subject_id, relation, target_ids",
        },
        "defects": [
            "the edit is a sentence; subject and object are not marked",
            "one key also occurs as Relation_Specifity, previous_fact also as original_fact",
            "answers of one letter cannot be checked and are left out, as by the official filter",
            "the official check also accepts an answer that stands in the prompt itself",
        ],
        "used_in": "ripple effects: what must change and what must stay",
    },
    "real": {
        "title": "Real facts",
        "citation": "made by this project (tools/real_facts.py) from the packages below; it ships with editkit",
        "files": [],
        "sources": list(real.SOURCES.values()),
        "records": {"stored facts": 8693, "facts that follow": 7068},
        "schema": {
            "relation": "capital, continent, currency, language of countries; country and state of cities; nationality "
            "and profession of people; symbol and series of elements; kind of place; mythology",
            "subject, object": "names; every relation is a function: one object per subject",
            "source": "the group of packages the row comes from",
        },
        "defects": [
            "992 candidates were left out when the table was made, mostly people without a full name or whose gloss "
            "does not begin with a profession, and names of two large places (the header of the table counts them)",
            "in 36 facts the language begins like the country (German, Germany): they are kept, because what follows "
            "from a city's country needs them",
            "496 people are British, English, Scottish or Welsh, as their gloss says; another source would say "
            "otherwise, and a model's answer can be right and not count",
            "professions are near synonyms (writer, author, novelist) and a person has several; only one counts",
            "nearly half of the people are American and half of the places rivers: a model that always says so looks "
            "well informed, so read recall beside the most frequent object",
            "the worked example in each prompt pulls towards its own object",
            "cities are the largest by the population of their administrative area; some are districts or suburbs",
            "24 names stand for things of two types (Jordan, Mercury)",
        ],
        "used_in": "recall and edits of a pretrained model",
    },
}


def markdown(name: str) -> str:
    """The card of a corpus as Markdown. KeyError for an unknown name."""
    card = CARDS[name]
    sources = [REGISTRY[f] for f in card["files"]]
    origins = [(s.home, s.licence, s.home) for s in sources] + card.get("sources", [])
    lines = [f"### {card['title']}", "", card["citation"], "", "| | |", "|---|---|"]
    lines += [f"| Licence | {', '.join(dict.fromkeys(licence for _, licence, _ in origins))} |"]
    named = (f"<{home}>" if what == home else f"[{what}]({home})" for what, _, home in origins)
    lines += [f"| Source | {', '.join(dict.fromkeys(named))} |"]
    lines += [f"| Records | {', '.join(f'{k}: {n:,}' for k, n in card['records'].items())} |"]
    lines += [f"| Used for | {card['used_in']} |", "", "| Field | Content |", "|---|---|"]
    lines += [f"| {field} | {text} |" for field, text in card["schema"].items()]
    lines += ["", "Known defects:", ""] + [f"- {text}" for text in card["defects"]]
    if sources:
        lines += ["", "| File | Checked | sha256 |", "|---|---|---|"]
    for file, source in zip(card["files"], sources, strict=True):
        how = "by hash" if source.sha256 else "no known hash" if source.url else "bring your own"
        lines.append(f"| {file} | {how} | {source.sha256 or '-'} |")
    return "\n".join(lines) + "\n"
