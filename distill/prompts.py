"""The `prompts` stage: problems from generators, files and the hub become `Prompt` records, split once.

A prompt's identity is a hash of its messages, so duplicates are found whatever their source, and the split is a
function of the problems alone: neither the order of rows nor their number in the file moves a problem that is not
needed to fill the set. Nothing on the held-out side, and with `split_by: numbers` no reordering of it, is ever on the
training side.
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

from distill.config import VERIFIERS, FileVerifier, PromptSource, ReasoningGymSource, Recipe
from distill.errors import DataError, RecipeError
from distill.progress import say
from distill.records import Message, Prompt, digest_json, write_records
from distill.rows import Row, check_file, hub_root, nearest, read_hub, read_rows, require_columns
from distill.runs import DigestCache, RunOptions, SealedRun, Step, open_run
from distill.verifiers import recorded_name, resolve
from distill.verifiers.answers import last_box, last_number, number_text

TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"


def run(recipe: Recipe, step: Step, options: RunOptions) -> SealedRun:
    """Write `train.jsonl` and `heldout.jsonl` of the recipe's own prompts, or `heldout.jsonl` of a named set.

    The counts hold rows, duplicates and prompts of each source. Raises DataError or RecipeError as `preflight` does,
    and DataError if nothing is left to train on.
    """
    if "set" in step.args:
        mixture = _evaluation_set(_sources(recipe, step)[0])
    else:
        mixture = mix(recipe.prompts)
    if not options.quiet:
        for line in mixture.notes:
            say(f"{step.label}: {line}")
    with open_run(step, options) as run:
        if "set" not in step.args:
            write_records(run.path(TRAIN_FILE), mixture.train)
        write_records(run.path(HELDOUT_FILE), mixture.heldout)
        return run.seal(_digest(mixture), mixture.counts)


def preflight(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Refuse what can be refused by looking at the first row of each source; writes nothing.

    Raises RecipeError (task, parameters, template, verifier) or DataError (files, columns, empty sources).
    """
    for source in _sources(recipe, step):
        check_template(source)
        first = next(iter(_prompts(source)), None)
        if first is None:
            raise DataError(f"prompts source {source.name!r}: no prompts in it")
        if first.gold is None and source.gold_column is not None and _rule_needs_a_match(source):
            raise DataError(
                f"prompts source {source.name!r}: rule {source.gold!r} finds no reference answer in column"
                f" {source.gold_column!r} of the first row; choose one of {', '.join(GOLD_RULES)}"
            )
        _check_verifier(source, first)


def roots(recipe_prompts: Sequence[PromptSource], cache: DigestCache) -> dict[str, str]:
    """What identifies the content of each source, by its name: a file's sha256, a generator's version, a data set's
    commit; a verifier of the user's own adds `NAME.verifier`.

    Raises DataError for a missing file, RecipeError for a missing verifier file.
    """
    found: dict[str, str] = {}
    for source in recipe_prompts:
        found[source.name] = _root(source, cache)
        if isinstance(source.verifier, FileVerifier):
            found[f"{source.name}.verifier"] = resolve(source.verifier).version
    return found


def _root(source: PromptSource, cache: DigestCache) -> str:
    if source.file is not None:
        check_file(source.file)
        return cache.of(source.file)
    if source.hub is not None:
        return hub_root(source.hub, cache)
    return f"reasoning-gym=={importlib.metadata.version('reasoning-gym')}"


def _sources(recipe: Recipe, step: Step) -> list[PromptSource]:
    """The sources a step reads."""
    if "set" not in step.args:
        return list(recipe.prompts)
    assert recipe.evaluate is not None  # the plan made this step from it
    source = recipe.evaluate.sets[step.args["set"]].source
    assert source is not None
    return [source]


def _check_verifier(source: PromptSource, first: Prompt) -> None:
    from distill.verifiers.pool import check_verifier

    spec = resolve(source.verifier)
    check_verifier(spec, first)
    if spec.name == "reasoning_gym" and "task" not in first.row:
        raise RecipeError(
            f"prompts source {source.name!r}: verifier reasoning_gym judges prompts made by reasoning-gym only;"
            f" choose one of {', '.join(name for name in VERIFIERS if name != spec.name)}"
        )


# --- reading one source ---------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """The distinct prompts of a source and what was met on the way."""

    prompts: list[Prompt]
    rows: int
    duplicates: int
    """Rows whose prompt had been read before."""
    conflicting: int
    """Those of them with another reference answer than the first."""
    no_gold: int
    """Prompts without a reference answer: they can be asked, but not verified."""


def read_source(source: PromptSource) -> list[Prompt]:
    """The distinct prompts of a source in the order of its rows; the first of equal prompts stays.

    Raises RecipeError for an unknown task, parameter or placeholder, DataError for rows that cannot be read.
    """
    return read_counted(source).prompts


def read_counted(source: PromptSource) -> Reading:
    """As `read_source`, with counts."""
    check_template(source)
    rows = duplicates = conflicting = 0
    kept: dict[str, Prompt] = {}
    for prompt in _prompts(source):
        rows += 1
        first = kept.setdefault(prompt.prompt_id, prompt)
        duplicates += first is not prompt
        conflicting += first.gold != prompt.gold
    if not kept:
        raise DataError(f"prompts source {source.name!r}: no prompts in it")
    no_gold = sum(prompt.gold is None for prompt in kept.values())
    if no_gold == len(kept) and source.gold_column is not None and _rule_needs_a_match(source):
        raise DataError(
            f"prompts source {source.name!r}: rule {source.gold!r} finds no reference answer in column"
            f" {source.gold_column!r} of any row; choose one of {', '.join(GOLD_RULES)}"
        )
    return Reading(list(kept.values()), rows, duplicates, conflicting, no_gold)


def _prompts(source: PromptSource) -> Iterator[Prompt]:
    verifier = recorded_name(source.verifier)
    for row in islice(_rows(source), source.limit):
        yield _prompt(row, source, verifier)


def _rows(source: PromptSource) -> Iterator[Row]:
    if source.reasoning_gym is not None:
        return _generate(source.reasoning_gym)
    if source.hub is not None:
        return read_hub(source.hub)
    assert source.file is not None  # exactly one kind is given
    return read_rows(source.file)


def _prompt(row: Row, source: PromptSource, verifier: str) -> Prompt:
    gold_column = [source.gold_column] if source.gold_column else []
    require_columns(row, [source.question_column, *gold_column])
    question = str(row.values[source.question_column] or "").strip()
    if not question:
        raise DataError(f"{row.where}: column {source.question_column!r} is empty; every row needs a problem")
    gold = GOLD_RULES[source.gold](_text(row.values[source.gold_column])) if source.gold_column else None
    return Prompt.of(
        [Message(role="user", content=render(source, row, question))],
        gold=gold or None,
        verifier=verifier,
        source=source.name,
        licence=source.licence,
        row=_kept_row(row, source, question),
    )


def _text(value: Any) -> str:
    """A column's value as text; numbers and lists as JSON writes them."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _kept_row(row: Row, source: PromptSource, question: str) -> dict[str, Any]:
    """What verifiers and built-in teachers may ask of a prompt; a verifier of the user's own may want any column."""
    if source.reasoning_gym is not None:
        entry = {key: value for key, value in row.values.items() if key != "question"}
        params = {"params": dict(source.reasoning_gym.params)} if source.reasoning_gym.params else {}
        return {"question": question, "task": source.reasoning_gym.task, **params, "entry": _plain_json(entry)}
    if isinstance(source.verifier, FileVerifier) or source.verifier not in VERIFIERS:
        return {**_plain_json(row.values), "question": question}
    return {"question": question}


def _plain_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(values, default=str)))


# --- templates ------------------------------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"\{\{(?P<literal>\w*)\}\}|\{(?P<name>[A-Za-z_]\w*)\}")


def placeholders(template: str) -> list[str]:
    """Names in `{braces}` of a template; `{{doubled}}` ones, `{}` and other braces are text."""
    return [match["name"] for match in _PLACEHOLDER.finditer(template) if match["name"]]


def check_template(source: PromptSource) -> None:
    """Refuse a template that would show no problem, show the reference answer, or drop the instruction.

    Raises RecipeError.
    """
    names = placeholders(source.template)
    where = f"prompts source {source.name!r}: template {source.template!r}"
    if not names or names == ["instruction"]:
        raise RecipeError(f"{where} shows no column of the row; write {{question}} where the problem goes")
    if source.gold_column in names and source.gold_column != source.question_column:
        raise RecipeError(
            f"{where} shows column {source.gold_column!r}, the reference answer, to the model; for text in braces"
            f" write {{{{{source.gold_column}}}}}"
        )
    if source.instruction and "instruction" not in names:
        raise RecipeError(f"{where} has no {{instruction}}, so the instruction would be lost; add it to the template")


def render(source: PromptSource, row: Row, question: str) -> str:
    """The user turn: `{question}` is the problem, `{instruction}` the source's instruction, others are columns.

    Raises RecipeError naming the columns for a placeholder that is none.
    """
    known = {**row.values, "question": question}
    if source.instruction or "instruction" not in row.values:
        known["instruction"] = source.instruction

    def fill(match: re.Match[str]) -> str:
        if match["name"] is None:
            return f"{{{match['literal']}}}"
        if match["name"] not in known:
            columns = ", ".join(dict.fromkeys([*row.values, "instruction"]))
            raise RecipeError(
                f"prompts source {source.name!r}: template asks for column {match['name']!r}, which {row.where} does"
                f" not have{nearest(match['name'], known)}; columns: {columns}"
            )
        return _text(known[match["name"]])

    return _PLACEHOLDER.sub(fill, source.template).strip()


# --- reference answers ----------------------------------------------------------------------------------------------


def _after_hashes(text: str) -> str | None:
    _, hashes, answer = text.rpartition("####")
    return answer.strip() if hashes else None


def _last_number(text: str) -> str | None:
    found = last_number(text)
    return None if found is None else number_text(found)


GOLD_RULES: Mapping[str, Callable[[str], str | None]] = {
    "as_is": str.strip,
    "after_hashes": _after_hashes,
    "boxed": last_box,
    "last_number": _last_number,
}
"""How a reference answer is taken from its column; None where the rule finds nothing."""


def _rule_needs_a_match(source: PromptSource) -> bool:
    return source.gold != "as_is"


# --- reasoning-gym --------------------------------------------------------------------------------------------------

SET_BY_SOURCE = ("seed", "size")
"""Parameters of every task that the source has fields for."""


def _generate(source: ReasoningGymSource) -> Iterator[Row]:
    """The task's problems; the generator is checked before the first is drawn."""
    from reasoning_gym import create_dataset

    params = check_task(source)
    dataset = create_dataset(source.task, seed=source.seed, size=source.size, **params)
    for index in range(source.size):
        entry = dict(dataset[index])
        if entry.get("answer") is not None:
            entry["answer"] = str(entry["answer"])
        yield Row(f"reasoning_gym {source.task}: problem {index}", entry)


def check_task(source: ReasoningGymSource) -> dict[str, Any]:
    """The task's parameters as its generator takes them.

    Raises RecipeError for an unknown task or parameter (with the nearest one) and for values that the task refuses.
    """
    from reasoning_gym.factory import DATASETS

    if source.task not in DATASETS:
        hint = nearest(source.task, DATASETS)
        raise RecipeError(f"reasoning_gym.task is {source.task!r}{hint}; choose one of {', '.join(sorted(DATASETS))}")
    kind = DATASETS[source.task][1]
    allowed = [name for name in kind.__dataclass_fields__ if name not in SET_BY_SOURCE]
    for name in source.params:
        if name in SET_BY_SOURCE:
            raise RecipeError(f"reasoning_gym.params.{name}: set reasoning_gym.{name} instead")
        if name not in allowed:
            hint = nearest(name, allowed)
            raise RecipeError(
                f"reasoning_gym.params: {source.task} has no parameter {name!r}{hint}; it takes {', '.join(allowed)}"
            )
    params = dict(source.params)
    try:
        config = kind(seed=source.seed, size=source.size, **params)
        if hasattr(config, "validate"):  # some tasks have nothing to refuse
            config.validate()
    except Exception as error:  # validation is by assertions, comparisons of whatever was given, or neither
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"reasoning_gym.params: {source.task} refuses {params}: {why}") from error
    return params


# --- splitting ------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Training prompts in the order given, held-out prompts in the order in which they were drawn."""

    train: list[Prompt]
    heldout: list[Prompt]


def split(prompts: Sequence[Prompt], source: PromptSource) -> Split:
    """Set `source.heldout` prompts aside, whole groups at a time, the same ones whatever the order of rows.

    Groups are ranked by a hash of the seed and the group; where the last one is larger than needed, its surplus is on
    neither side. Raises RecipeError if nothing would be left to train on.
    """
    if source.heldout == 0:
        return Split(list(prompts), [])
    if source.heldout >= len(prompts):
        raise RecipeError(
            f"prompts source {source.name!r}: heldout is {source.heldout}, but there are only {len(prompts)} distinct"
            " prompts; hold out fewer or add prompts"
        )
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(group_of(prompt, source), []).append(prompt)
    ranked = sorted(groups, key=lambda group: _rank(source.split_seed, group))
    heldout: list[Prompt] = []
    touched: set[str] = set()
    for group in ranked:
        if len(heldout) == source.heldout:
            break
        members = sorted(groups[group], key=lambda prompt: prompt.prompt_id)
        heldout += members[: source.heldout - len(heldout)]
        touched.add(group)
    return Split([prompt for prompt in prompts if group_of(prompt, source) not in touched], heldout)


def group_of(prompt: Prompt, source: PromptSource) -> str:
    """What must not be on both sides: the prompt, or the numbers of its question in any order."""
    if source.split_by == "numbers" and (numbers := numbers_of(prompt)):
        return numbers
    return prompt.prompt_id


_DIGITS = re.compile(r"\d+(?:\.\d+)?")


def numbers_of(prompt: Prompt) -> str:
    """The sorted multiset of numbers in the question (`13 13 2`), empty if it has none.

    Signs do not count, and a comma parts two numbers (`3,4` may be a list): both can only join groups that a finer
    reading would keep apart, never part reorderings of one problem.
    """
    question = str(prompt.row.get("question", prompt.text))
    return " ".join(sorted(_canonical(digits) for digits in _DIGITS.findall(question)))


def _canonical(digits: str) -> str:
    whole, _, decimals = digits.partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")


def _rank(seed: int, group: str) -> str:
    return hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()


# --- the mixture of all sources -------------------------------------------------------------------------------------


class Mixture(NamedTuple):
    """Both sides of all sources, with counts and what is worth saying."""

    train: list[Prompt]
    heldout: list[Prompt]
    counts: dict[str, Any]
    notes: list[str]


def mix(sources: Sequence[PromptSource]) -> Mixture:
    """Read, split and mix sources; a prompt of several sources belongs to the first.

    Raises DataError if nothing is left to train on, and as `read_source` and `split` do.
    """
    train: dict[str, list[Prompt]] = {}
    heldout: dict[str, list[Prompt]] = {}
    counts: dict[str, dict[str, int]] = {}
    seen: set[str] = set()
    for source in sources:
        reading = read_counted(source)
        own = [prompt for prompt in reading.prompts if prompt.prompt_id not in seen]
        seen.update(prompt.prompt_id for prompt in own)
        train[source.name], heldout[source.name] = split(own, source)
        counts[source.name] = {
            "rows": reading.rows,
            "duplicates": reading.duplicates + len(reading.prompts) - len(own),
            "conflicting": reading.conflicting,
            "no_gold": reading.no_gold,
            "split_surplus": len(own) - len(train[source.name]) - len(heldout[source.name]),
        }
    for source in sources:
        kept = _away_from(heldout, train[source.name], sources)
        counts[source.name]["kept_apart"] = len(train[source.name]) - len(kept)
        train[source.name] = kept
    for name, kept in subsample(train, sources).items():
        counts[name]["subsampled_away"] = len(train[name]) - len(kept)
        train[name] = kept
        counts[name] |= {"train": len(kept), "heldout": len(heldout[name])}
    if not any(train.values()):
        raise DataError("prompts: nothing is left to train on; hold out fewer prompts or add some")
    return Mixture(_joined(train), _joined(heldout), _totals(counts), _notes(counts))


def _evaluation_set(source: PromptSource) -> Mixture:
    """Every prompt of a set's own source."""
    reading = read_counted(source)
    counts = {
        "rows": reading.rows,
        "duplicates": reading.duplicates,
        "conflicting": reading.conflicting,
        "no_gold": reading.no_gold,
        "heldout": len(reading.prompts),
    }
    return Mixture([], reading.prompts, _totals({source.name: counts}), _notes({source.name: counts}))


def _away_from(
    heldout: Mapping[str, list[Prompt]], prompts: Sequence[Prompt], sources: Iterable[PromptSource]
) -> list[Prompt]:
    """The prompts that belong to no group of any source's held-out ones, by that source's own grouping."""
    kept = list(prompts)
    for source in sources:
        groups = {group_of(prompt, source) for prompt in heldout[source.name]}
        kept = [prompt for prompt in kept if group_of(prompt, source) not in groups]
    return kept


def subsample(train: Mapping[str, list[Prompt]], sources: Sequence[PromptSource]) -> dict[str, list[Prompt]]:
    """Shrink the sources that have weights until their counts are in proportion to them; none grows.

    The source that is scarcest for its weight stays whole; which prompts of the others stay is decided by a hash of
    the seed and the prompt, so it does not depend on the order of rows.
    """
    weighted = [source for source in sources if source.weight is not None]
    scale = min((Fraction(len(train[source.name])) / Fraction(source.weight or 1) for source in weighted), default=None)
    kept = {name: list(prompts) for name, prompts in train.items()}
    for source in weighted:
        assert scale is not None and source.weight is not None
        count = int(scale * Fraction(source.weight))
        ranked = sorted(train[source.name], key=lambda prompt: _rank(source.split_seed, f"mixture:{prompt.prompt_id}"))
        chosen = {prompt.prompt_id for prompt in ranked[:count]}
        kept[source.name] = [prompt for prompt in train[source.name] if prompt.prompt_id in chosen]
    return kept


def _joined(by_source: Mapping[str, list[Prompt]]) -> list[Prompt]:
    return [prompt for prompts in by_source.values() for prompt in prompts]


def _totals(counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Sums over the sources, and each source beside them."""
    keys = dict.fromkeys(key for of_source in counts.values() for key in of_source)
    sums = {key: sum(of_source.get(key, 0) for of_source in counts.values()) for key in keys}
    return {**sums, "sources": {name: dict(of_source) for name, of_source in counts.items()}}


NOTED = {
    "duplicates": "dropped {count} of {rows} rows: the same prompt had been read before",
    "conflicting": "{count} of those duplicates have another reference answer than the first; look at the data",
    "no_gold": "{count} prompts have no reference answer and cannot be verified",
    "split_surplus": "dropped {count} prompts that share their numbers with held-out ones beyond the number asked for",
    "kept_apart": "dropped {count} training prompts that share their group with held-out ones of another source",
    "subsampled_away": "left out {count} prompts to keep the mixture's weights",
}
"""Decisions worth a line, by their count."""


def _notes(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    notes = []
    for name, of_source in counts.items():
        for key, text in NOTED.items():
            if of_source.get(key):
                notes.append(f"{name}: " + text.format(count=of_source[key], rows=of_source["rows"]))
        train = f"{of_source['train']} to train, " if "train" in of_source else ""
        notes.append(f"{name}: {train}{of_source['heldout']} held out")
    return notes


def _digest(mixture: Mixture) -> str:
    """Digest of all records; a verifier file counts by its content, not by where it lies."""
    labels = {name: resolve(name).label for name in {prompt.verifier for prompt in mixture.train + mixture.heldout}}
    return digest_json(
        [
            [{**prompt.model_dump(mode="json"), "verifier": labels[prompt.verifier]} for prompt in side]
            for side in (mixture.train, mixture.heldout)
        ]
    )
