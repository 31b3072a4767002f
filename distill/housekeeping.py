"""The run store as a whole: what lies in it, what was made from what, and what nobody needs any more.

A stage run is needed by every pipeline record and every sweep that names it, by what was shipped from it, and by every
artifact it is upstream of. The ledger of teacher answers, which was paid for, is never touched.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.errors import LockedError, RecipeError, RunError, storage_errors
from distill.plan import STAGES
from distill.runs import STAGE_FILE, holder_of, locked

PIPELINES, SWEEPS, SHIPPED = "pipelines", "sweeps", "shipped"

State = Literal["done", "unfinished", "running"]


@dataclass(frozen=True)
class StageFolder:
    """One stage run on the disk."""

    folder: Path
    document: Mapping[str, Any]
    """Its stage.json; empty where it is not finished."""
    bytes: int

    @property
    def identity(self) -> str:
        """What it is made from."""
        return self.folder.name.rpartition("-")[2]

    @property
    def stage(self) -> str:
        """Stage name."""
        return self.folder.parent.name

    @property
    def state(self) -> State:
        """Whether it is finished, and if not whether somebody works on it."""
        if self.document:
            return "done"
        return "running" if holder_of(self.folder) else "unfinished"

    @property
    def upstream(self) -> list[str]:
        """Identities of the stages that it was made from; none are known of an unfinished one."""
        return list(self.document.get("upstream", {}).values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "stage": self.stage, "label": self.document.get("label", self.stage), "identity": self.identity,
            "folder": str(self.folder), "state": self.state, "bytes": self.bytes,
            "seconds": self.document.get("seconds"), "finished": self.document.get("finished"),
            "upstream": dict(self.document.get("upstream", {})),
        }  # fmt: skip


class Need(NamedTuple):
    """Something that has a name and needs stage runs."""

    kind: Literal["pipeline", "sweep", "artifact", "shipped"]
    name: str
    identities: frozenset[str]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def list_runs(runs: Path) -> list[StageFolder]:
    """Every stage run of a store, in the order of stages. Raises RunError if there is no such store."""
    if not runs.is_dir():
        raise RunError(f"{runs}: no run store there; name it with --runs DIR")
    return [
        StageFolder(folder, _document(folder / STAGE_FILE), folder_bytes(folder))
        for stage in STAGES
        for folder in sorted((runs / stage).glob("*-*"))
        if folder.is_dir()
    ]


def _document(path: Path) -> dict[str, Any]:
    """A JSON object; empty where it is absent or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; files that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def find_run(found: Sequence[StageFolder], name: str) -> StageFolder:
    """A stage run by its folder, its name or the start of its identity.

    Raises RunError if there is none, or more than one.
    """
    path = Path(name)
    fit = [one for one in found if one.folder.name == path.name or one.identity.startswith(name)]
    if len(fit) != 1:
        what = "no stage run is" if not fit else f"{len(fit)} stage runs are"
        raise RunError(
            f"{name!r}: {what} called so; give a folder, or the start of an identity, as distill runs shows it"
        )
    return fit[0]


def tree(found: Sequence[StageFolder], root: StageFolder) -> Iterator[tuple[int, StageFolder]]:
    """A stage run and what it was made from, each with its depth; what comes again is not opened again."""
    by_identity = {one.identity: one for one in found}
    seen: set[str] = set()

    def visit(one: StageFolder, depth: int) -> Iterator[tuple[int, StageFolder]]:
        yield depth, one
        if one.identity not in seen:
            seen.add(one.identity)
            for identity in dict.fromkeys(one.upstream):
                if identity in by_identity:
                    yield from visit(by_identity[identity], depth + 1)

    return visit(root, 0)


# --- what is needed -------------------------------------------------------------------------------------------------


def needs(runs: Path, found: Iterable[StageFolder]) -> list[Need]:
    """Everything with a name in a store, and the stage runs that it names itself."""
    named: list[Need] = []
    for path in sorted((runs / PIPELINES).glob("*.json")):
        steps = _document(path).get("steps", {})
        named.append(Need("pipeline", path.stem, frozenset(step["identity"] for step in steps.values())))
    for path in sorted((runs / SWEEPS).glob("*/sweep.json")):
        named.append(Need("sweep", path.parent.name, frozenset(_document(path).get("stages", {}))))
    for one in found:
        if one.stage == "export" and one.document:
            named.append(Need("artifact", one.folder.name, frozenset([one.identity])))
    for folder in sorted(path for path in (runs / SHIPPED).glob("*") if path.is_dir()):
        lineage = [_document(path).get("identity", "") for path in (folder / "lineage").glob("*.json")]
        named.append(Need("shipped", folder.name, frozenset(lineage)))
    return named


def named_needs(all_needs: Sequence[Need], names: Sequence[str]) -> list[Need]:
    """Those of these names; all of them where no name is given.

    Raises RecipeError for a name that nothing has.
    """
    for name in names:
        if not any(_is_called(one, name) for one in all_needs):
            known = ", ".join(sorted({one.name for one in all_needs})[:20]) or "nothing"
            raise RecipeError(f"{name!r}: no pipeline, sweep or artifact is called so; there is {known}")
    return [one for one in all_needs if not names or any(_is_called(one, name) for name in names)]


def _is_called(one: Need, name: str) -> bool:
    """By its whole name, or a pipeline or artifact by the recipe's."""
    return one.name == name or one.name.rpartition("-")[0] == name


def kept(found: Sequence[StageFolder], wanted: Iterable[Need]) -> set[str]:
    """Identities of all that these need: what they name, and what that was made from."""
    by_identity = {one.identity: one for one in found}
    waiting = [identity for one in wanted for identity in one.identities]
    keep: set[str] = set()
    while waiting:
        identity = waiting.pop()
        if identity not in keep:
            keep.add(identity)
            waiting.extend(by_identity[identity].upstream if identity in by_identity else ())
    return keep


class Collected(NamedTuple):
    """What can go, or went."""

    removed: list[StageFolder]
    kept: int
    busy: list[StageFolder]
    """Not needed, but somebody writes them now."""
    needed_by: list[Need]
    """What keeps the others."""

    @property
    def bytes(self) -> int:
        """Bytes that are freed."""
        return sum(one.bytes for one in self.removed)


def collect(runs: Path, names: Sequence[str] = (), delete: bool = False) -> Collected:
    """Find the stage runs that nothing of these names needs, or without names nothing at all; and delete them.

    Only `delete` removes anything. What a sweep needs that runs now, and a run that somebody writes, stay whatever is
    named. Raises RecipeError for an unknown name, StorageError if the disk refuses.
    """
    found = list_runs(runs)
    there = needs(runs, found)
    wanted = named_needs(there, names)
    wanted += [one for one in there if one not in wanted and one.kind == "sweep" and _runs_now(runs, one)]
    keep = kept(found, wanted)
    spare = [one for one in found if one.identity not in keep]
    busy = [one for one in spare if one.state == "running"]
    removed = [one for one in spare if one not in busy]
    if delete:
        with storage_errors(f"cannot delete in {runs}"):
            removed = [one for one in removed if _delete(one)]
    return Collected(removed, len(found) - len(spare), busy, wanted)


def _runs_now(runs: Path, sweep: Need) -> bool:
    return holder_of(runs / SWEEPS / sweep.name) is not None


def _delete(one: StageFolder) -> bool:
    """Remove a stage run; its stage.json first, so that what a kill leaves is no finished run."""
    try:
        with locked(one.folder, "it is being written"):
            (one.folder / STAGE_FILE).unlink(missing_ok=True)
            shutil.rmtree(one.folder)
    except LockedError:
        return False
    return True
