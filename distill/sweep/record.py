"""What a sweep keeps in its folder of the run store, `sweeps/NAME/`, for everyone who only reads.

`sweep.json` says what the sweep is: base recipe, trials, stages. `events.jsonl` says what happened, line by line: how
each stage ended, which trials were pruned. `live.json` says what runs at this moment. Whether a stage is done is asked
of the run store alone, so nothing here can contradict it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from distill.config import Located
from distill.errors import DataError, RunError
from distill.records import repair_tail, write_json
from distill.runs import holder_of, open_sealed

from .config import Resources, Sweep, SweepFile
from .graph import Graph, Store, node_json, read_store
from .resources import cpu_slots, needed
from .trials import Recipes, Trial

SWEEPS = "sweeps"
RECORD, EVENTS, LIVE, STUDY = "sweep.json", "events.jsonl", "live.json", "study"

State = Literal["done", "running", "waiting", "failed", "pruned", "left out"]


class Event(BaseModel):
    """One line of what happened: how a stage ended, or a trial that was pruned."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    what: Literal["stage", "pruned", "attempt"]
    at: str
    identity: str = ""
    label: str = ""
    outcome: str = ""
    seconds: float = 0.0
    """Wall time of the process, or of an attempt."""
    started: str = ""
    """When it began; of an attempt to the microsecond, which tells it from the others."""
    error: str = ""
    exit_code: int = 0
    cpus: int = 0
    gpus: tuple[int, ...] = ()
    executor: str = ""
    trials: tuple[str, ...] = ()
    """Keys of the trials that were given up."""


def now() -> str:
    """The time, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Events:
    """The log of a sweep; a line that a kill tore is cut off when it is opened for writing."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVENTS
        if self.path.exists():
            repair_tail(self.path)
        self.seen = read_events(folder)

    def count_killed(self) -> None:
        """Count the attempt of a driver that was killed, by the last moment at which it noted that it lives."""
        live = self.path.with_name(LIVE)
        try:
            attempt = json.loads(live.read_text(encoding="utf-8"))["attempt"]
        except (OSError, ValueError, KeyError):
            return
        if not any(event.what == "attempt" and event.started == attempt["started"] for event in self.seen):
            self.add(Event(what="attempt", at=now(), outcome="killed", **attempt))
        live.unlink()

    def add(self, event: Event) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as out:
            out.write(event.model_dump_json(exclude_defaults=True) + "\n")
        self.seen.append(event)


def read_events(folder: Path) -> list[Event]:
    """What happened so far; a last line that is still being written is left out."""
    path = folder / EVENTS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [Event.model_validate_json(line) for line in lines if line]


def pruned(events: Iterable[Event]) -> dict[str, set[str]]:
    """Trainings that fell behind, by identity, and the keys of the trials that were given up with them."""
    found: dict[str, set[str]] = {}
    for event in events:
        if event.what == "pruned":
            found.setdefault(event.identity, set()).update(event.trials)
    return found


def attempt_seconds(events: Iterable[Event]) -> float:
    """Seconds of the attempts that have ended, and of those whose driver was killed."""
    return sum(event.seconds for event in events if event.what == "attempt")


def failures(events: Iterable[Event]) -> dict[str, Event]:
    """Stages whose last end was a failure, by identity."""
    last = {event.identity: event for event in events if event.what == "stage"}
    return {identity: event for identity, event in last.items() if event.outcome in ("failed", "died")}


def write_record(folder: Path, file: SweepFile, graph: Graph, resources: Resources) -> None:
    """Write down what the sweep is, and what its stages take of the resources that it runs with."""
    write_json(
        folder / RECORD,
        {
            "schema": 1,
            "name": file.sweep.name,
            "file": str(file.path.resolve()),
            "updated": now(),
            "base_path": str(file.base_path.resolve()),
            "base": file.base.value,
            "sweep": file.sweep.model_dump(mode="json", by_alias=True),
            "slots": cpu_slots(resources),
            "trials": [
                {
                    "number": trial.number,
                    "key": trial.key,
                    "seed": trial.seed,
                    "overrides": trial.overrides,
                    "pipeline": graph.plans[trial.number].identity,
                    "stages": [node.identity for node in graph.steps(trial.number)],
                }
                for trial in graph.trials.values()
            ],
            "stages": {
                identity: {**node_json(node), "cpus": needed(node.step, node.recipe, resources)[0].cpus}
                for identity, node in graph.nodes.items()
            },
        },
    )


@dataclass(frozen=True)
class Record:
    """A sweep as its folder tells it."""

    folder: Path
    document: Mapping[str, Any]
    store: Store
    events: list[Event] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The sweep's name."""
        return str(self.document["name"])

    @property
    def runs(self) -> Path:
        """The run store."""
        return self.folder.parent.parent

    @cached_property
    def sweep(self) -> Sweep:
        """The sweep file as it was when the sweep last ran."""
        return Sweep.model_validate(self.document["sweep"])

    @cached_property
    def recipes(self) -> Recipes:
        """Makes the recipes of its trials."""
        return Recipes(Located(dict(self.document["base"]), {}), Path(self.document["base_path"]), self.name)

    @cached_property
    def _trials(self) -> dict[int, Mapping[str, Any]]:
        return {one["number"]: one for one in self.document["trials"]}

    @property
    def numbers(self) -> list[int]:
        """Numbers of its trials, in the order in which they run."""
        return list(self._trials)

    def trial(self, number: int) -> Trial:
        """A trial with its recipe. Raises RunError if there is none of that number."""
        one = self._trials.get(number)
        if one is None:
            raise RunError(f"{self.name} has no trial {number}; it has {len(self._trials)}, see distill sweep status")
        return Trial(number, one["overrides"], one["seed"], self.recipes.make(one["overrides"]))

    def pipeline(self, number: int) -> str:
        """Identity of a trial's whole pipeline."""
        return str(self._trials[number]["pipeline"])

    def stages_of(self, number: int) -> list[str]:
        """Identities of a trial's stages, upstream first."""
        return list(self._trials[number]["stages"])

    def stage(self, identity: str) -> Mapping[str, Any]:
        """What is written down of a stage."""
        return dict(self.document["stages"][identity])

    def folder_of(self, identity: str) -> Path:
        """Where a stage's run lies, or will lie."""
        stage = self.stage(identity)
        return self.store.folders.get(identity) or self.runs / stage["stage"] / f"{stage['name']}-{identity}"

    @property
    def slots(self) -> int:
        """CPU slots that its stages share."""
        return int(self.document.get("slots", 1))

    @cached_property
    def live(self) -> Mapping[str, Any]:
        """What runs now; empty where no driver holds the sweep."""
        if holder_of(self.folder) is None:
            return {}
        try:
            return dict(json.loads((self.folder / LIVE).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    @cached_property
    def running(self) -> dict[str, float]:
        """Identities of the stages that run now, with the seconds that each has been running."""
        return {one["identity"]: float(one["seconds"]) for one in self.live.get("running", [])}

    @property
    def attempts_s(self) -> float:
        """Seconds of all attempts to run it so far."""
        return attempt_seconds(self.events) + float(self.live.get("attempt", {}).get("seconds", 0.0))

    @cached_property
    def spent_usd(self) -> float | None:
        """Dollars that its finished generate stages have spent; None where none has finished yet."""
        paid = [one for one, stage in self.document["stages"].items() if stage["stage"] == "generate"]
        done = [open_sealed(self.folder_of(one), check=False) for one in paid if one in self.store.sealed]
        return sum(float(run.counts.get("spent_usd") or 0.0) for run in done) if done else None

    @cached_property
    def _failed(self) -> dict[str, Event]:
        return failures(self.events)

    @cached_property
    def _pruned(self) -> dict[str, set[str]]:
        return pruned(self.events)

    def state_of(self, number: int) -> State:
        """How far a trial has come."""
        stages = self.stages_of(number)
        if self.store.sealed.issuperset(stages):
            return "done"
        open_stages = [identity for identity in stages if identity not in self.store.sealed]
        if any(identity in self.running for identity in open_stages):
            return "running"
        if any(self._trials[number]["key"] in self._pruned.get(identity, ()) for identity in open_stages):
            return "pruned"
        if self._failed.keys() & set(open_stages):
            return "failed"
        return "left out" if number in self._left_out else "waiting"

    @cached_property
    def _left_out(self) -> set[int]:
        return (
            {one["number"] for one in self.document["trials"][self.sweep.limits.trials :]}
            if (self.sweep.limits.trials)
            else set()
        )

    def failure_of(self, number: int) -> Event | None:
        """What stopped a trial; None where nothing did."""
        open_stages = [one for one in self.stages_of(number) if one not in self.store.sealed]
        return next((self._failed[one] for one in open_stages if one in self._failed), None)


def known_numbers(folder: Path) -> dict[str, int]:
    """Numbers of the trials that the sweep had when it last ran, by key: a trial keeps its number as a sweep grows."""
    try:
        document = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {one["key"]: one["number"] for one in document["trials"]}


def sweep_folder(name: str, runs: Path) -> Path:
    """Where a sweep keeps what happened."""
    return runs / SWEEPS / name


def read_record(target: Path | str, runs: Path) -> Record:
    """A sweep by its file, its folder or its name.

    Raises RunError if it has not been started in this run store, DataError if its record is damaged.
    """
    folder = _folder_of(Path(target), runs)
    path = folder / RECORD
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = sorted(one.parent.name for one in (runs / SWEEPS).glob(f"*/{RECORD}"))
        there = f"; there are: {', '.join(known)}" if known else ""
        raise RunError(f"{target}: no sweep of that name in {runs}{there}; start it with: distill sweep FILE") from None
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); run the sweep again, which writes it anew") from error
    return Record(folder, document, read_store(folder.parent.parent), read_events(folder))


def _folder_of(target: Path, runs: Path) -> Path:
    if target.suffix in (".yaml", ".yml"):
        from .config import load_sweep

        return sweep_folder(load_sweep(target).sweep.name, runs)
    return target if (target / RECORD).is_file() else sweep_folder(target.name, runs)
