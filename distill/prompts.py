"""The `prompts` stage: problems from generators, files and the hub become `Prompt` records, split once.

A prompt's identity is a hash of its messages, so duplicates are found whatever their source, and the split is a
function of the problems alone: neither the order of rows nor their number in the file moves a problem that is not
needed to fill the set. Nothing on the held-out side, and with `split_by: numbers` no reordering of it, is ever on the
training side. Sources are read twice, so that they may be larger than memory: once to decide over a few integers a
row (see `distill.mixture`), once to write.
"""

import hashlib
import importlib.metadata
import json
import re
import tempfile
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

from distill import mixture
from distill.config import VERIFIERS, PromptSource, ReasoningGymSource, Recipe
from distill.errors import DataError, RecipeError
from distill.mixture import Choice, Marks
from distill.progress import Bar, progress, say
from distill.records import Message, Prompt, prompt_id_of, write_records
from distill.rows import Row, check_file, hub_root, nearest, read_hub, read_rows, require_columns
from distill.runs import DigestCache, OpenRun, RunOptions, SealedRun, Step, open_run
from distill.verifiers import columns_of, recorded_name, resolve
from distill.verifiers.answers import last_box, last_number, number_text

ItemT = TypeVar("ItemT")

TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"
SHOWN_EVERY = 1000
"""Rows between two moves of the progress bar."""


def run(recipe: Recipe, step: Step, options: RunOptions) -> SealedRun:
    """Write `train.jsonl` and `heldout.jsonl` of the recipe's own prompts, or `heldout.jsonl` of a named set.

    The counts hold rows, duplicates and prompts of each source. Raises DataError or RecipeError as `preflight` does,
    and DataError if nothing is left to train on or a source changes while it is read.
    """
    sources, is_set = _sources(recipe, step), "set" in step.args
    with tempfile.TemporaryDirectory() as scratch:
        with progress(f"{step.label}: reading", None, options, "rows") as bar:
            readings = read_marks(sources, Path(scratch), bar)
        choices = [mixture.hold_out_all(readings[0])] if is_set else mixture.choose(sources, readings)
        counts = {source.name: choice.counts for source, choice in zip(sources, choices)}
        if not options.quiet:
            for line in mixture.notes(counts):
                say(f"{step.label}: {line}")
        with open_run(step, options) as run:
            with progress(f"{step.label}: writing", sum(map(len, readings)), options, "rows") as bar:
                chosen = read_chosen(sources, Path(scratch), readings, choices, bar)
                digest = _write(run, chosen, choices, is_set)
            return run.seal(digest, mixture.totals(counts))


def preflight(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Refuse what can be refused by looking at the first row of each source; writes nothing.

    Raises RecipeError (task, parameters, template, verifier) or DataError (files, columns, empty sources).
    """
    for source in _sources(recipe, step):
        check_template(source)
        problem = next(_problems(source), None)
        if problem is None:
            raise DataError(f"prompts source {source.name!r}: no prompts in it")
        first = _prompt(problem, source)
        if first.gold is None and source.gold_column is not None and _rule_needs_a_match(source):
            raise DataError(
                f"prompts source {source.name!r}: rule {source.gold!r} finds no reference answer in column"
                f" {source.gold_column!r} of the first row; choose one of {', '.join(GOLD_RULES)}"
            )
        _check_verifier(source, first)


def roots(recipe_prompts: Sequence[PromptSource], cache: DigestCache) -> dict[str, str]:
    """What identifies the content of each source, by its name: a file's sha256, a generator's version, a data set's
    commit; a verifier of the user's own, or one with options, adds `NAME.verifier`.

    Raises DataError for a missing file, RecipeError for a missing verifier file.
    """
    found: dict[str, str] = {}
    for source in recipe_prompts:
        found[source.name] = _root(source, cache)
        if not isinstance(source.verifier, str):
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
    if "task" not in first.row and any(leaf.name == "reasoning_gym" for leaf in spec.leaves()):
        raise RecipeError(
            f"prompts source {source.name!r}: verifier reasoning_gym judges prompts made by reasoning-gym only;"
            f" choose one of {', '.join(name for name in VERIFIERS if name != 'reasoning_gym')}"
        )


# --- reading, twice -------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A row as its source asks it."""

    row: Row
    question: str
    messages: tuple[Message, ...]
    prompt_id: str
    gold: str | None


def read_source(source: PromptSource) -> list[Prompt]:
    """The distinct prompts of a source in the order of its rows; the first of equal prompts stays.

    Raises RecipeError for an unknown task, parameter or placeholder, DataError for rows that cannot be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        readings = read_marks([source], Path(scratch))
        chosen = read_chosen([source], Path(scratch), readings, [mixture.hold_out_all(readings[0])])
        return [prompt for _, prompt in chosen]


def read_marks(sources: Sequence[PromptSource], scratch: Path, bar: Bar | None = None) -> list[Marks]:
    """The first pass: what of each source's rows decides their places; raises as `read_source` does.

    What generators make is kept in the folder `scratch` for the second pass.
    """
    mark = _marker(sources)
    readings = []
    for source in sources:
        check_template(source)
        marks = np.fromiter(
            (mark(problem, source) for problem in _counted(_problems(source, scratch), bar)), mixture.MARKS
        )
        if not len(marks):
            raise DataError(f"prompts source {source.name!r}: no prompts in it")
        if source.gold_column is not None and _rule_needs_a_match(source) and not marks["gold"].any():
            raise DataError(
                f"prompts source {source.name!r}: rule {source.gold!r} finds no reference answer in column"
                f" {source.gold_column!r} of any row; choose one of {', '.join(GOLD_RULES)}"
            )
        readings.append(marks)
    return readings


def read_chosen(
    sources: Sequence[PromptSource],
    scratch: Path,
    readings: Sequence[Marks],
    choices: Sequence[Choice],
    bar: Bar | None = None,
) -> Iterator[tuple[int, Prompt]]:
    """The second pass: the side and the prompt of every row that was not dropped, in the order of the rows.

    Raises DataError if a source has other rows than in the first pass.
    """
    mark = _marker(sources)
    for source, marks, choice in zip(sources, readings, choices):
        sides, number = choice.sides(len(marks)), 0
        for number, problem in enumerate(_counted(_problems(source, scratch), bar), 1):
            if number > len(marks) or marks[number - 1].item() != mark(problem, source):
                raise _changed(source, problem.row.where)
            if sides[number - 1] != mixture.DROPPED:
                yield int(sides[number - 1]), _prompt(problem, source)
        if number < len(marks):
            raise _changed(source, "its end")


def _changed(source: PromptSource, where: str) -> DataError:
    return DataError(
        f"prompts source {source.name!r}: its rows changed while they were read (seen at {where}); run again when"
        " nothing writes to it"
    )


def _marker(sources: Sequence[PromptSource]) -> Callable[[Problem, PromptSource], tuple[int, int, int, int]]:
    """The function that gives a row's `MARKS`; hashes of Python's own hold for this process, and so for both passes."""
    by_numbers = any(source.heldout and source.split_by == "numbers" for source in sources)

    def mark(problem: Problem, source: PromptSource) -> tuple[int, int, int, int]:
        numbers = numbers_of(problem.question) if by_numbers else ""
        group = numbers if numbers and source.split_by == "numbers" else problem.prompt_id
        return (
            int(problem.prompt_id, 16),
            hash(problem.gold) if problem.gold else 0,
            hash(numbers),  # that of the empty text is 0
            mixture.rank(source.split_seed, group) if source.heldout else 0,
        )

    return mark


def _counted(items: Iterable[ItemT], bar: Bar | None) -> Iterator[ItemT]:
    """The items, shown on the bar as they pass."""
    number = 0
    for number, item in enumerate(items, 1):
        yield item
        if bar and number % SHOWN_EVERY == 0:
            bar.advance(SHOWN_EVERY)
    if bar:
        bar.advance(number % SHOWN_EVERY)


def _problems(source: PromptSource, scratch: Path | None = None) -> Iterator[Problem]:
    return (_problem(row, source) for row in islice(_rows(source, scratch), source.limit))


def _rows(source: PromptSource, scratch: Path | None) -> Iterator[Row]:
    if source.reasoning_gym is not None:
        made = scratch and scratch / f"{source.name}.jsonl"
        return read_rows(made) if made and made.exists() else _generate(source.reasoning_gym, made)
    if source.hub is not None:
        return read_hub(source.hub)
    assert source.file is not None  # exactly one kind is given
    return read_rows(source.file)


def _problem(row: Row, source: PromptSource) -> Problem:
    gold_column = [source.gold_column] if source.gold_column else []
    require_columns(row, [source.question_column, *gold_column])
    question = str(row.values[source.question_column] or "").strip()
    if not question:
        raise DataError(f"{row.where}: column {source.question_column!r} is empty; every row needs a problem")
    gold = GOLD_RULES[source.gold](_text(row.values[source.gold_column])) if source.gold_column else None
    messages = (Message(role="user", content=render(source, row, question)),)
    return Problem(row, question, messages, prompt_id_of(messages), gold or None)


def _prompt(problem: Problem, source: PromptSource) -> Prompt:
    return Prompt(
        prompt_id=problem.prompt_id,
        messages=problem.messages,
        gold=problem.gold,
        verifier=recorded_name(source.verifier),
        source=source.name,
        licence=source.licence,
        row=_kept_row(problem.row, source, problem.question),
    )


def _text(value: Any) -> str:
    """A column's value as text; numbers and lists as JSON writes them."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _kept_row(row: Row, source: PromptSource, question: str) -> dict[str, Any]:
    """What verifiers and built-in teachers may ask of a prompt; a verifier of the user's own may want any column.

    Raises DataError, with the nearest one, for a row without a column that its verifier needs.
    """
    if source.reasoning_gym is not None:
        entry = {key: value for key, value in row.values.items() if key != "question"}
        params = {"params": dict(source.reasoning_gym.params)} if source.reasoning_gym.params else {}
        return {"question": question, "task": source.reasoning_gym.task, **params, "entry": _plain_json(entry)}
    columns = columns_of(source.verifier)
    if columns is None:
        return {**_plain_json(row.values), "question": question}
    require_columns(row, columns.required)
    wanted = {name: row.values[name] for name in (*columns.required, *columns.optional) if name in row.values}
    return {**_plain_json(wanted), "question": question}


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


def _generate(source: ReasoningGymSource, keep: Path | None) -> Iterator[Row]:
    """The task's problems; the generator is checked before the first is drawn.

    They are also written to the file `keep`, to be read from there the next time: some tasks take a second for each.
    """
    from reasoning_gym import create_dataset

    params = check_task(source)
    dataset = create_dataset(source.task, seed=source.seed, size=source.size, **params)
    with keep.open("w", encoding="utf-8") if keep else nullcontext() as out:
        for index in range(source.size):
            entry = dict(dataset[index])
            if entry.get("answer") is not None:
                entry["answer"] = str(entry["answer"])
            line = json.dumps(entry, default=str)
            if out:
                out.write(line + "\n")
            yield Row(f"reasoning_gym {source.task}: problem {index}", json.loads(line))


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


# --- the numbers of a question --------------------------------------------------------------------------------------

_DIGITS = re.compile(r"\d+(?:\.\d+)?")


def numbers_of(question: str) -> str:
    """The sorted multiset of numbers in a question (`13 13 2`), empty if it has none.

    Signs do not count, and a comma parts two numbers (`3,4` may be a list): both can only join groups that a finer
    reading would keep apart, never part reorderings of one problem.
    """
    return " ".join(sorted(_canonical(digits) for digits in _DIGITS.findall(question)))


def _canonical(digits: str) -> str:
    whole, _, decimals = digits.partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")


# --- writing --------------------------------------------------------------------------------------------------------


def _write(run: OpenRun, chosen: Iterator[tuple[int, Prompt]], choices: Sequence[Choice], is_set: bool) -> str:
    """Write both sides, or the held-out one of a set; returns the digest of their records."""
    digest = _Digest()
    with tempfile.TemporaryFile(dir=run.work) as file:
        heldout = _Spool(file)
        train = map(digest.add, _trained(chosen, heldout))
        if is_set:
            deque(train, maxlen=0)  # nothing trains: the held-out prompts are put aside on the way
        else:
            write_records(run.path(TRAIN_FILE), train)
        digest.end_list()
        write_records(run.path(HELDOUT_FILE), map(digest.add, heldout.take(mixture.drawn_places(choices))))
    return digest.hexdigest


def _trained(chosen: Iterable[tuple[int, Prompt]], heldout: "_Spool") -> Iterator[Prompt]:
    for side, prompt in chosen:
        if side == mixture.HELDOUT:
            heldout.put(prompt)
        else:
            yield prompt


class _Spool:
    """Prompts on the disk, put down in one order and taken up in another."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._starts = array("Q")

    def put(self, prompt: Prompt) -> None:
        self._starts.append(self._file.tell())
        self._file.write(prompt.to_line().encode())

    def take(self, places: Iterable[int]) -> Iterator[Prompt]:
        for place in places:
            self._file.seek(self._starts[place])
            yield Prompt.model_validate_json(self._file.readline())


class _Digest:
    """`digest_json([train, heldout])` over prompts that come one at a time.

    A verifier file counts by its content, not by where it lies.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"[[")
        self._separator = b""
        self._labels: dict[str, str] = {}
        self._encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode

    def add(self, prompt: Prompt) -> Prompt:
        """Count a prompt and pass it on."""
        label = self._labels.get(prompt.verifier) or resolve(prompt.verifier).label
        self._labels[prompt.verifier] = label
        text = self._encode({**prompt.model_dump(mode="json"), "verifier": label})
        self._hash.update(self._separator + text.encode())
        self._separator = b","
        return prompt

    def end_list(self) -> None:
        """What follows is the second list."""
        self._hash.update(b"],[")
        self._separator = b""

    @property
    def hexdigest(self) -> str:
        """The digest of both lists, once all is in."""
        whole = self._hash.copy()
        whole.update(b"]]")
        return whole.hexdigest()
