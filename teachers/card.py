"""The data set's card: what is in it, where it comes from, how it was chosen, and how to make it again.

Written from what the run counted, with nothing that differs from one run to the next. What is not known, such as a
licence that nobody stated, is said and not guessed. Local folders and addresses of servers are left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from distill import __version__
from distill.cards import (
    code,
    fenced,
    html_text,
    markdown_table,
    one_line,
    origin,
    published,
    sampling,
    text,
    without_folders,
)
from distill.config import Recipe, TeacherConfig
from distill.licences import Stated, hub_fields, in_table, problems
from distill.records import Example, Teacher
from distill.runs import Step

from .funnel import REASONS, Funnel, actions
from .training_set import Contents, DataFile

TAGS = ("reasoning", "knowledge-distillation", "synthetic")
OUTCOMES = ("correct", "wrong", "unverifiable", "timeout", "error")

COLUMNS = {
    "prompt": "the messages that the teacher was asked, without any system prompt",
    "reasoning": "the teacher's reasoning, without markers; null where the recipe trains on answers alone",
    "answer": "what the teacher wrote after it",
    "messages": "the prompt and the answer as one chat, the reasoning inside {open} and {close}",
    "gold": "the reference answer that the verifier compared with",
    "source": "name of the prompt source",
    "licence": "licence of the prompt, as its source states it",
    "trace_id": "identity of the teacher's answer",
    "prompt_id": "identity of the prompt: a hash of its messages",
    "verdicts": "what each verifier (name and version) said of the answer",
    "usage": "tokens as the teacher's engine counted them; 0 where it counts none",
    "model": "the teacher",
}


@dataclass(frozen=True)
class Facts:
    """What a card is made from."""

    recipe: Recipe
    step: Step
    funnel: Funnel
    contents: Contents
    files: Sequence[DataFile]
    sets: Mapping[str, int]
    """Evaluation sets that the prompts were held against, with their number of prompts."""


def card(facts: Facts) -> str:
    """The README.md of the data set, in Markdown."""
    parts = (
        header, opening, splits, columns, sources, teacher, licences, selection, verdicts, examples, reproduction,
        files, limits,
    )  # fmt: skip
    return "\n\n".join(section for part in parts if (section := part(facts))) + "\n"


# --- the header -----------------------------------------------------------------------------------------------------


def header(facts: Facts) -> str:
    """What hubs and loaders read."""
    found = dict.fromkeys(file.split for file in facts.files)
    configuration = {
        "config_name": "default",
        "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in found],
    }
    plain = {
        "pretty_name": facts.recipe.name,
        **hub_fields(stated_licences(facts)),
        "task_categories": ["text-generation"],
        "tags": [*TAGS, "distill"],
        "size_categories": [size_category(facts.funnel.examples)],
        "configs": [configuration],
    }
    return "---\n" + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True) + "---"


def size_category(rows: int) -> str:
    """The hub's word for a number of rows."""
    bounds = [(10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M"), (10**8, "100M")]
    below = "n"
    for bound, name in bounds:
        if rows < bound:
            return f"n<{name}" if below == "n" else f"{below}<n<{name}"
        below = name
    return "n>100M"


# --- sections -------------------------------------------------------------------------------------------------------


def opening(facts: Facts) -> str:
    """The first paragraph."""
    funnel, models = facts.funnel, sorted({text(name(found)) for found in facts.contents.teachers})
    tokens = f" {facts.contents.output_tokens:,} tokens," if facts.contents.output_tokens else ""
    return (
        f"# {facts.recipe.name}\n\n"
        f"{funnel.examples:,} reasoning traces of {', '.join(models)} for {funnel.prompts:,} prompts,{tokens} verified"
        f" and selected from {funnel.samples:,} with distill {__version__}."
    )


def splits(facts: Facts) -> str:
    """How to load it, and what the splits are."""
    rows = {split: sum(file.rows for file in facts.files if file.split == split) for split in ("train", "heldout")}
    what = {
        "train": "what trains: prompt, reasoning, answer",
        "heldout": "the recipe's held-out prompts with their references: **no traces, never to be trained on**."
        " A student is measured on them",
    }
    table = markdown_table(["split", "rows", "what"], [[s, f"{n:,}", what[s]] for s, n in rows.items() if n])
    return (
        "## Use\n\n```python\nfrom datasets import load_dataset\n\n"
        'train = load_dataset("FOLDER", split="train")\n```\n\n'
        f"`FOLDER` is this folder, or its name on a hub. Other trainers take the chat column alone:"
        f' `train.select_columns("messages")`.\n\n{table}'
    )


def columns(facts: Facts) -> str:
    """Their meaning."""
    markers = {"open": code(facts.recipe.format.open_marker), "close": code(facts.recipe.format.close_marker)}
    rows = [[f"`{column}`", meaning.format(**markers)] for column, meaning in COLUMNS.items()]
    return "## Columns\n\n" + markdown_table(["column", "meaning"], rows)


def sources(facts: Facts) -> str:
    """Where the prompts come from."""
    contents = facts.contents
    rows = [
        [
            source.name, origin(source), in_table(contents.licences.get(source.name, {source.licence})),
            f"{contents.examples[source.name]:,}", f"{contents.heldout[source.name]:,}",
        ]
        for source in facts.recipe.prompts
    ]  # fmt: skip
    titles = ["source", "from", "licence", "examples", "held out"]
    return "## Prompts\n\n" + markdown_table(titles, rows)


def teacher(facts: Facts) -> str:
    """Who wrote the traces, and how they were drawn."""
    asked = asked_teacher(facts)
    rows = [
        [
            text(name(t)),
            text(t.revision or "not known"),
            text(f"{t.engine} {t.engine_version}"),
            in_table(_said(t, asked)),
            f"{n:,}",
        ]
        for t, n in facts.contents.by_teacher
    ]
    table = markdown_table(["model", "revision", "engine", "licence", "examples"], rows)
    return f"## Teacher\n\n{table}\n\n" + "\n".join(f"- {line}" for line in sampling(asked))


def asked_teacher(facts: Facts) -> TeacherConfig:
    """The recipe's teacher."""
    assert facts.recipe.teacher is not None  # there would be no traces
    return facts.recipe.teacher


def licences(facts: Facts) -> str:
    """What stands in the way of using it freely."""
    found = list(problems(stated_licences(facts)))
    if not found:
        return "## Licences\n\nEvery source and the teacher state a licence that is known; see the tables above."
    listed = "\n".join(f"- {problem}" for problem in found)
    return f"## Licences\n\nOpen questions, to be settled before this data set is passed on:\n\n{listed}"


def selection(facts: Facts) -> str:
    """The funnel, the flags and the settings behind them."""
    funnel = facts.funnel
    rows = [["asked for", f"{funnel.samples:,}", "", ""]] + [
        [step["reason"], f"{step['remaining']:,}", f"{step['dropped']:,}", step["why"]] for step in funnel.steps
    ]
    rows.append(["**examples**", f"**{funnel.examples:,}**", "", f"for {funnel.prompts:,} prompts"])
    return (
        "## Selection\n\nEvery trace ends in exactly one line: it trains, or it was dropped for the first reason.\n\n"
        + ("\n\n".join([markdown_table(["step", "left", "dropped", "why"], rows), *flags(facts)]))
    )


def flags(facts: Facts) -> Iterator[str]:
    """What was noticed, dropped or not, and what was looked for."""
    done = actions(facts.recipe.select)
    rows = [
        [flag, f"{count:,}", REASONS.get(flag, ""), "counted only" if done.get(flag) == "flag" else "dropped"]
        for flag, count in facts.funnel.flags.items()
    ]
    if rows:
        yield "Flags (a trace may have several):\n\n" + markdown_table(
            ["flag", "traces", "meaning", "then"], sorted(rows)
        )
    words = {"drop": "Looked for and dropped", "flag": "Looked for and only counted", "ignore": "Not looked for"}
    for action, word in words.items():
        if named := [flag for flag, chosen in done.items() if chosen == action]:
            yield f"{word}: {', '.join(named)}."
    against = ", ".join(f"{name} ({count:,} prompts)" for name, count in facts.sets.items() if count)
    yield f"Prompts were held against these evaluation sets: {against or 'none, the recipe has none'}."


def verdicts(facts: Facts) -> str:
    """What verifiers said, by source."""
    rows = [
        [source, *(f"{found[outcome]:,}" for outcome in OUTCOMES), f"{found.total():,}"]
        for source, found in sorted(facts.funnel.outcomes.items())
    ]
    verifiers = ", ".join(code(label) for label in facts.step.fields.get("verifiers", ()))
    return f"## Verdicts\n\nBy {verifiers or 'the verifier of each prompt'}.\n\n" + markdown_table(
        ["source", *OUTCOMES, "verified"], rows
    )


def examples(facts: Facts) -> str:
    """The first ones, folded."""
    return "## Examples\n\n" + "\n\n".join(folded(example) for example in facts.contents.shown)


def folded(example: Example) -> str:
    """One example in a block that opens when it is clicked."""
    parts = {"prompt": example.prompt.text, "reasoning": example.reasoning, "answer": example.answer}
    shown = "\n\n".join(f"{title}:\n\n{fenced(part)}" for title, part in parts.items() if part)
    asked, gold = one_line(example.prompt.text), example.prompt.gold
    title = (asked if len(asked) <= 100 else f"{asked[:100]}…") + (f" (reference: {one_line(gold)})" if gold else "")
    return f"<details>\n<summary>{html_text(title)}</summary>\n\n{shown}\n\n</details>"


def reproduction(facts: Facts) -> str:
    """The recipe and the command."""
    roots = {
        **facts.step.upstream["prompts"].fields.get("roots", {}),
        **facts.step.upstream["traces"].fields.get("roots", {}),
    }
    inputs = "\n".join(f"- {code(what)}: {code(str(digest))}" for what, digest in roots.items())
    recipe = yaml.safe_dump(published_recipe(facts.recipe), sort_keys=False, allow_unicode=True, width=100)
    return (
        "## Make it again\n\nSave this as `recipe.yaml`, beside it the files it names, and run"
        f" `distill select recipe.yaml` with distill {__version__}. The selection's identity is"
        f" `{facts.step.identity}`, the digest of its result `{facts.funnel.digest}`.\n\n"
        f"{fenced(recipe, 'yaml')}\n\n" + (f"Its inputs, by content or version:\n\n{inputs}" if inputs else "")
    ).rstrip()


def files(facts: Facts) -> str:
    """The bytes of this folder."""
    rows = [[f"`{f.name}`", f"{f.rows:,}", f"{f.bytes:,}", f"`{f.sha256}`"] for f in facts.files]
    return "## Files\n\n" + markdown_table(["file", "rows", "bytes", "sha256"], rows)


def limits(facts: Facts) -> str:
    """What a user of the data should not take for granted."""
    return "## Known limits\n\n" + "\n".join(f"- {line}" for line in known_limits(facts))


def known_limits(facts: Facts) -> Iterator[str]:
    """One sentence each."""
    select = facts.recipe.select
    if select.outcomes == ["correct"]:
        yield "A verdict is on the final answer: reasoning that is wrong on the way to a right one passes."
        yield "Prompts that the teacher never answered right are missing: what is here is easier than what was asked."
    else:
        yield f"Answers judged {', '.join(select.outcomes)} are in it: not every answer is right."
    yield "Flags come from rules that rather miss something than drop what is good; nobody has read every trace."
    yield "Contamination is found by wording: a paraphrase or a translation of an evaluation problem passes."
    if any(source.reasoning_gym for source in facts.recipe.prompts):
        yield "Generated problems are worded alike, so of these only equal ones were kept apart."
    if not any(facts.sets.values()):
        yield "There was no evaluation set to hold the prompts against."
    if facts.recipe.format.system is not None:
        yield (
            "`messages` has no system prompt; the recipe trains its student with"
            f" {code(facts.recipe.format.system) if facts.recipe.format.system.strip() else 'an empty one'}."
        )
    yield (
        "Some chat templates (those of R1 and Qwen3 among them) cut reasoning out of an assistant's turn: look at the"
        " rendered text before training on `messages`."
    )


# --- licences -------------------------------------------------------------------------------------------------------


def stated_licences(facts: Facts) -> list[Stated]:
    """Those of every source in use and every teacher, each once; also where recipe and traces say different things."""
    asked, numbers = asked_teacher(facts), {source.name: n for n, source in enumerate(facts.recipe.prompts)}
    of_sources = [
        Stated(f"prompt source {source}", licence, f"prompts.{numbers.get(source, 0)}.licence")
        for source, found in sorted(facts.contents.licences.items())
        for licence in sorted(found, key=str)
    ]
    said = {(f"teacher {name(found)}", licence) for found in facts.contents.teachers for licence in _said(found, asked)}
    return [*of_sources, *(Stated(whose, licence, "teacher.licence") for whose, licence in sorted(said, key=str))]


def _said(found: Teacher, asked: TeacherConfig) -> set[str | None]:
    """Licences of a teacher by its traces and by the recipe."""
    said = {licence for licence in (found.licence, asked.licence) if licence}
    return {*said} or {None}


# --- the recipe as it can be shown ----------------------------------------------------------------------------------


def published_recipe(recipe: Recipe) -> dict[str, Any]:
    """The parts that made this data set, less defaults, prices, addresses and folders."""
    shown = published(recipe)
    kept = {key: shown[key] for key in ("name", "prompts", "teacher", "select") if key in shown}
    markers = {key: text for key, text in shown.get("format", {}).items() if key.endswith("_marker")}
    sets = shown.get("evaluate", {}).get("sets")
    return kept | ({"format": markers} if markers else {}) | ({"evaluate": {"sets": sets}} if sets else {})


def name(found: Teacher) -> str:
    """What a teacher is called."""
    return without_folders(found.model) or found.engine
