"""Reading traces as a person would: each with its prompt, reasoning, answer, verdict and flags, from any target.

A target is a recipe, a pipeline's record, a stage's folder or a JSON Lines file of traces, items or examples. Prompts,
verdicts and flags lie beside the traces or upstream of them, so this module follows the lineage. It reads only.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import Recipe, load_recipe
from distill.errors import DataError, RecipeError, RunError
from distill.records import Example, Flag, Item, Prompt, RecordT, Teacher, Trace, Verdict
from distill.runs import STAGE_FILE, RunOptions

SHOWN_STAGES = ("generate", "select", "eval", "export")
"""Stages that hold traces."""

EXCERPT_CHARS = 1600
"""Longest text shown whole; longer ones lose their middle unless everything is asked for."""

SHOWN_AT_FIRST = 10
"""How many traces are shown in a terminal unless a number is given."""


@dataclass(frozen=True)
class Filters:
    """Which traces to show; all that are given must hold."""

    wrong: bool = False
    """The verifier said wrong."""
    correct: bool = False
    """The verifier said correct."""
    truncated: bool = False
    """Cut at the token limit, or reasoning that was never closed."""
    failed: bool = False
    """No answer came at all."""
    key: str | None = None
    """Start of a prompt_id or trace_id."""
    limit: int | None = SHOWN_AT_FIRST
    """Show at most so many; None shows all."""
    stage: str | None = None
    """Label of the stage in a recipe or pipeline, or its start: `select`, `eval:student`."""

    def admit(self, shown: "Shown") -> bool:
        """Whether a trace passes."""
        outcome = shown.verdict.outcome if shown.verdict else None
        checks = (
            not self.wrong or outcome == "wrong",
            not self.correct or outcome == "correct",
            not self.truncated or shown.truncated,
            not self.failed or shown.trace.failed,
            not self.key or shown.trace.trace_id.startswith(self.key) or shown.trace.prompt_id.startswith(self.key),
        )
        return all(checks)

    def __str__(self) -> str:
        """What the filters leave in, in words; empty where they leave everything in."""
        named = [name for name in ("wrong", "correct", "truncated", "failed") if getattr(self, name)]
        named += [f"ids from {self.key}"] if self.key else []
        named += [f"stage {self.stage}"] if self.stage else []
        named += [f"the first {self.limit:,}"] if self.limit else []
        return ", ".join(named)


class Shown(NamedTuple):
    """One trace with everything that is known about it."""

    label: str
    """Stage label or file it comes from."""
    trace: Trace
    prompt: Prompt | None = None
    verdict: Verdict | None = None
    flags: tuple[Flag, ...] = ()
    dropped: str | None = None
    """Why selection did not let it train; None where it did, or where nothing was selected."""
    kept: bool | None = None
    """Whether selection let it train; None where nothing was selected."""

    @property
    def accepted(self) -> bool:
        """Whether it is worth its money: kept by selection or, where nothing was selected, judged correct."""
        return self.kept if self.kept is not None else bool(self.verdict and self.verdict.correct)

    @property
    def truncated(self) -> bool:
        """Whether the text ends before its author did."""
        marks = {flag.flag for flag in self.flags} & {"truncated", "unclosed"}
        return self.trace.finish_reason == "length" or self.trace.think == "unclosed" or bool(marks)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {
            "label": self.label,
            "prompt": self.prompt.model_dump(mode="json", by_alias=True) if self.prompt else None,
            "trace": self.trace.model_dump(mode="json", by_alias=True),
            "verdict": self.verdict.model_dump(mode="json", by_alias=True) if self.verdict else None,
            "flags": [flag.model_dump(mode="json", by_alias=True) for flag in self.flags],
            "dropped": self.dropped,
            "kept": self.kept,
        }


class Place(NamedTuple):
    """A stage run on the disk and the folders of the stages it reads, by role."""

    label: str
    folder: Path
    upstream: Mapping[str, Path]


def show(target: Recipe | Path | str, filters: Filters, overrides: Sequence[str], runs: Path) -> Iterator[Shown]:
    """The traces of a target that pass the filters, one after the other.

    Raises RunError if nothing has been run yet, DataError if a file holds no traces; what is wrong with a file is said
    when its traces are read.
    """
    if isinstance(target, str | Path) and Path(target).suffix == ".jsonl":
        found = _of_file(Path(target))
    else:
        places = _places(target, overrides, runs)
        found = (shown for place in _chosen(places, filters.stage) for shown in _of_place(place))
    return islice((shown for shown in found if filters.admit(shown)), filters.limit or None)


def name_of(target: Recipe | Path | str) -> str:
    """What a target is called: the recipe's name, or that of its file or folder without the way there."""
    if isinstance(target, Recipe):
        return target.name
    path = Path(target)
    return path.resolve().name if path.suffix == ".jsonl" or path.is_dir() else path.stem


# --- from a target to folders ---------------------------------------------------------------------------------------


def _places(target: Recipe | Path | str, overrides: Sequence[str], runs: Path) -> list[Place]:
    """Every stage run of a recipe, pipeline record or stage folder that exists, in pipeline order."""
    if isinstance(target, Recipe):
        return _of_recipe(target, runs)
    path = Path(target)
    if path.suffix in (".yaml", ".yml"):
        return _of_recipe(load_recipe(path, overrides), runs)
    if overrides:
        raise RecipeError(f"{overrides[0]!r}: overrides go with a recipe; {path} is what a run left")
    if path.is_dir():
        return [place_of_folder(path)]
    if path.suffix == ".json" and path.is_file():
        return _of_pipeline(path)
    raise DataError(
        f"{path}: no such run; give a recipe (.yaml), a pipeline (runs/pipelines/*.json), a stage's folder or a .jsonl"
    )


def _of_recipe(recipe: Recipe, runs: Path) -> list[Place]:
    from distill.plan import make_plan

    steps = make_plan(recipe, RunOptions(runs)).steps.values()
    return [
        Place(step.label, step.folder, {role: other.folder for role, other in step.upstream.items()})
        for step in steps
        if step.folder.is_dir()
    ]


def _of_pipeline(path: Path) -> list[Place]:
    document = read_document(path)
    if "steps" not in document:
        raise DataError(f"{path}: not a pipeline's record (no steps in it); they lie in runs/pipelines/")
    steps, runs = document["steps"], path.resolve().parent.parent
    folders = {label: runs / step["folder"] for label, step in steps.items()}
    return [
        Place(label, folders[label], {role: folders[other] for role, other in step["upstream"].items()})
        for label, step in steps.items()
        if folders[label].is_dir()
    ]


def place_of_folder(folder: Path) -> Place:
    """A stage run by its folder; an unfinished one is looked up in the pipelines that name it."""
    folder = folder.resolve()
    runs = folder.parent.parent
    if (folder / STAGE_FILE).is_file():
        document = read_document(folder / STAGE_FILE)
        found = {role: next(runs.glob(f"*/*-{identity}"), None) for role, identity in document["upstream"].items()}
        return Place(document["label"], folder, {role: path for role, path in found.items() if path})
    for record in sorted((runs / "pipelines").glob("*.json")):
        for place in _of_pipeline(record):
            if place.folder.resolve() == folder:
                return place
    raise RunError(f"{folder}: not a stage run (no {STAGE_FILE} in it, and no pipeline names it)")


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object of the run store. Raises DataError where it is absent or damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: not what a run left (a JSON {type(document).__name__})")
    return document


def _chosen(places: Sequence[Place], stage: str | None) -> list[Place]:
    """The stages to show: as asked, else the verified traces, else the bare answers, else what was evaluated."""
    spread = [part for place in places for part in _variants(place)]
    holding = [place for place in spread if place.label.partition(":")[0] in SHOWN_STAGES]
    if not holding:
        raise RunError("nothing to show yet: no answers have been generated or evaluated; run the recipe first")
    for wanted in [stage] if stage else ["select", "generate", "eval", "export"]:
        if found := [place for place in holding if _is_under(place.label, wanted)]:
            return found
    raise RunError(f"no stage {stage!r} here; choose one of {', '.join(place.label for place in holding)}")


def _variants(place: Place) -> list[Place]:
    """An export run as one place a variant that was evaluated in it; any other run as it is."""
    if place.label != "export":
        return [place]
    evaluated = sorted(items.parent for items in place.folder.glob("eval-*/items.jsonl"))
    return [Place(f"export:{folder.name.removeprefix('eval-')}", folder, {}) for folder in evaluated]


def _is_under(label: str, wanted: str) -> bool:
    return label == wanted or label.startswith(wanted + ":")


# --- from folders to traces -----------------------------------------------------------------------------------------


def _of_place(place: Place) -> Iterator[Shown]:
    if (items := place.folder / "items.jsonl").is_file():
        yield from _items(items, place.label)
        return
    holder = place.upstream.get("traces", place.folder)
    # a run that is not finished lists its failures already
    if not any((holder / name).is_file() for name in ("traces.jsonl", "failed.jsonl")):
        raise RunError(f"{place.folder}: no traces in it yet; run the same command again to finish the stage")
    prompts = _prompts(place, holder)
    for name in ("traces.jsonl", "failed.jsonl"):
        yield from _traces(holder / name, place.label, prompts, beside=[place.folder, holder])


def _prompts(place: Place, holder: Path) -> dict[str, Prompt]:
    """Prompts upstream of a stage, by id."""
    folders = [folder for role, folder in place.upstream.items() if role == "prompts"]
    if not folders and holder != place.folder:
        folders = [folder for role, folder in place_of_folder(holder).upstream.items() if role == "prompts"]
    files = [file for folder in folders for file in sorted(folder.glob("*.jsonl"))]
    return {prompt.prompt_id: prompt for file in files for prompt in _read(file, Prompt)}


def _items(path: Path, label: str) -> Iterator[Shown]:
    for item in _read(path, Item):
        yield Shown(label, item.trace, item.prompt, item.verdict)


def _traces(path: Path, label: str, prompts: Mapping[str, Prompt], beside: Iterable[Path]) -> Iterator[Shown]:
    """Traces with the verdicts, flags and drops of the folders they lie beside."""
    verdicts: dict[str, Verdict] = {}
    flags: dict[str, list[Flag]] = {}
    dropped: dict[str, str] = {}
    folders = list(dict.fromkeys(beside))
    selected = any((folder / "dropped.jsonl").is_file() for folder in folders)
    for folder in folders:
        dropped |= _drops(folder / "dropped.jsonl")
        verdicts |= {verdict.trace_id: verdict for verdict in _read(folder / "verdicts.jsonl", Verdict)}
        for flag in _read(folder / "flags.jsonl", Flag):
            flags.setdefault(flag.trace_id, []).append(flag)
    for trace in _read(path, Trace):
        prompt, verdict = prompts.get(trace.prompt_id), verdicts.get(trace.trace_id)
        marks, reason = tuple(flags.get(trace.trace_id, ())), dropped.get(trace.trace_id)
        yield Shown(label, trace, prompt, verdict, marks, reason, kept=reason is None if selected else None)


def _drops(path: Path) -> dict[str, str]:
    """Reasons by trace, as selection wrote them."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {row["trace_id"]: row["reason"] for row in map(json.loads, lines)}


def _of_file(path: Path) -> Iterator[Shown]:
    """Traces, items or examples of one JSON Lines file."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a .jsonl file of traces, a stage's folder, a pipeline or a recipe")
    keys = _first_keys(path)
    if {"verdict", "trace", "prompt"} <= keys:
        yield from _items(path, path.name)
    elif {"trace_id", "cfg", "raw"} <= keys:
        yield from _traces(path, path.name, {}, beside=[path.parent])
    elif {"prompt", "trace_id", "answer"} <= keys:
        yield from map(_as_shown, _read(path, Example))
    elif keys:
        raise DataError(f"{path}:1: neither traces nor items nor examples; its keys are {', '.join(sorted(keys))}")


def _as_shown(example: Example) -> Shown:
    """A training example as the trace it was made from, as far as it tells."""
    trace = Trace(
        trace_id=example.trace_id,
        prompt_id=example.prompt.prompt_id,
        cfg="",
        sample=0,
        reasoning=example.reasoning,
        answer=example.answer,
        think="absent" if example.reasoning is None else "closed",
        teacher=Teacher(engine="unknown"),
    )
    return Shown("examples", trace, example.prompt, kept=True)


def _first_keys(path: Path) -> set[str]:
    with path.open(encoding="utf-8") as lines:
        first = next(lines, "")
    try:
        return set(json.loads(first)) if first.strip() else set()
    except (ValueError, TypeError):
        raise DataError(f"{path}:1: not JSON Lines") from None


def _read(path: Path, kind: type[RecordT]) -> Iterator[RecordT]:
    """Records of a file that may be absent or still being written: a last line without its end is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                return
            try:
                yield kind.model_validate_json(line)
            except ValueError:
                raise DataError(f"{path}:{number}: not a {kind.__name__} record") from None


# --- for people -----------------------------------------------------------------------------------------------------


def as_text(shown: Shown, number: int, whole: bool = False) -> str:
    """One trace as readable text; long parts lose their middle unless `whole`."""
    trace = shown.trace
    lines = [f"--- {number}. {_heading(shown)} ---"]
    if shown.prompt:
        lines += _part("system", *(m.content for m in shown.prompt.messages if m.role == "system"), whole=whole)
        lines += _part("prompt", shown.prompt.text, whole=whole)
    if trace.failed:
        lines += _part("error", trace.error or "", whole=whole)
    elif trace.reasoning is not None:
        lines += _part("reasoning", trace.reasoning, whole=whole)
    lines += _part("answer", trace.answer, whole=whole)
    if not trace.answer and not trace.reasoning:
        lines += _part("raw", trace.raw.strip(), whole=whole)
    lines += _part("verdict", _verdict(shown), whole=True)
    lines += _part("dropped", shown.dropped or "", whole=True)
    lines += _part("flags", *(f"{flag.flag}: {flag.detail}".rstrip(": ") for flag in shown.flags), whole=whole)
    return "\n".join(lines) + "\n"


def _heading(shown: Shown) -> str:
    trace = shown.trace
    facts = [shown.label, f"prompt {trace.prompt_id}", f"trace {trace.trace_id}"]
    if shown.prompt and shown.prompt.source:
        facts.append(shown.prompt.source)
    if trace.usage.output:
        facts.append(f"{trace.usage.output} tokens")
    return " | ".join([*facts, f"finish {trace.finish_reason}", f"reasoning {trace.think}"])


def _verdict(shown: Shown) -> str:
    if shown.verdict is None:
        return ""
    gold = shown.verdict.gold if shown.verdict.gold is not None else shown.prompt.gold if shown.prompt else None
    detail = f"; {shown.verdict.detail}" if shown.verdict.detail else ""
    return f"{shown.verdict.outcome} ({shown.verdict.verifier}; reference {gold!r}{detail})"


def _part(name: str, *texts: str, whole: bool) -> list[str]:
    """A named part, indented; none where there is no text."""
    lines = [line for text in texts if text for line in (text if whole else _excerpt(text)).splitlines()]
    return [f"{name + ':':<11}{lines[0]}", *(f"{'':<11}{line}" for line in lines[1:])] if lines else []


def _excerpt(text: str, chars: int = EXCERPT_CHARS) -> str:
    if len(text) <= chars:
        return text
    half = chars // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters; --full shows all …]\n{text[-half:]}"
