"""The verbs as typed functions, for notebooks and programs; the command line is a thin layer over these.

A recipe is given as a `Recipe` or as the path of a file. Where and how fast a stage runs is given by keywords and is
never part of its identity, so a run started here is found again by the command line and the other way round.
"""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from distill import pipeline, plan
from distill.config import Recipe, load_recipe
from distill.hub import check_push
from distill.inspection import Filters, Shown, name_of, show
from distill.pipeline import Outcome
from distill.plan import Plan
from distill.processes import launched
from distill.runs import RunOptions, Shard

if TYPE_CHECKING:
    from distill.comparison import Comparison
    from distill.export.verify import Check
    from distill.housekeeping import Collected, StageFolder
    from distill.students.check import Finding
    from distill.sweep.forecast import SweepForecast
    from distill.sweep.results import Results as SweepResults
    from distill.sweep.run import SweepOutcome
    from distill.teachers.forgetting import Forgotten
    from distill.teachers.pilot import Pilot
    from distill.viewer import Written


def _recipe(recipe: Recipe | Path | str) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


class Where(TypedDict, total=False):
    """Where and how fast to run; the keywords of every verb."""

    runs: Path | str
    """Run store; `runs` by default."""
    device: str
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    threads: int
    """CPU threads; 0 takes every core this process may use."""
    quiet: bool
    """No progress on stderr."""
    require: bool
    """Count a gate that could not run as failed."""
    accept_partial: bool
    """Take the traces that the ledger has now as all there are, and ask for none."""


def options(**where: Unpack[Where]) -> RunOptions:
    """The same as the record that stages take."""
    given: dict[str, Any] = dict(where)
    given["runs"] = Path(where.get("runs", "runs"))
    given["ask"] = not where.get("accept_partial", False)
    return RunOptions(**given)


def make_plan(recipe: Recipe | Path | str, **where: Unpack[Where]) -> Plan:
    """The stages of a recipe with their identities; runs nothing and writes nothing under runs/.

    The keywords are those of `Where`. Raises RecipeError, DataError or ModelError if a root is missing.
    """
    return plan.make_plan(_recipe(recipe), options(**where))


def run(recipe: Recipe | Path | str, until: str | None = None, **where: Unpack[Where]) -> Outcome:
    """Run a recipe, resuming where it stopped; `until` names the last stage wanted (all of them by default).

        outcome = distill.run("recipe.yaml", runs="runs", threads=2)
        outcome.results["eval:student:heldout"].counts

    The keywords are those of `Where`. Raises DistillError subclasses: nothing is written for bad input, GateError
    comes after a failed gate, BudgetError when a budget was reached.
    """
    return pipeline.run_recipe(_recipe(recipe), options(**where), until)


def generate(recipe: Recipe | Path | str, **where: Unpack[Where]) -> Outcome:
    """Let the teacher answer the recipe's prompts; `outcome.results["generate"]` is the set of traces.

    A recipe with `logprobs` goes on to the selected traces and stores the distributions of its teachers over them.
    """
    loaded = _recipe(recipe)
    scored = loaded.logprobs and any(step.stage == "score" for step in make_plan(loaded, **where).steps.values())
    return run(loaded, "score" if scored else "generate", **where)


def score(recipe: Recipe | Path | str, **where: Unpack[Where]) -> Outcome:
    """Store the teachers' distributions over the selected traces; `outcome.results["score:NAME"]` is a cache."""
    return run(recipe, "score", **where)


def generate_shard(recipe: Recipe | Path | str, shard: str, **where: Unpack[Where]) -> dict[str, Any]:
    """Let the teacher answer one part of the prompts (`2/4`); `merge` puts the parts together. Returns counts."""
    return pipeline.run_shard(_recipe(recipe), replace(options(**where), shard=Shard.parse(shard)))


def generate_shards(
    recipe: Recipe | Path | str, shards: int, executor: str = "local", **where: Unpack[Where]
) -> Outcome:
    """Answer all parts of the prompts in processes of their own (`local`) or as Ray tasks (`ray`), then merge."""
    from distill.executors import run_shards

    loaded, chosen = _recipe(recipe), options(**where)
    run_shards(loaded, chosen, shards, executor)
    return pipeline.merge(loaded, chosen)


def merge(recipe: Recipe | Path | str, others: Sequence[Path | str] = (), **where: Unpack[Where]) -> Outcome:
    """Put together what shards answered, here and in other run stores; asks for nothing."""
    return pipeline.merge(_recipe(recipe), options(**where), [Path(other) for other in others])


def pilot(recipe: Recipe | Path | str, prompts: int, **where: Unpack[Where]) -> "Pilot":
    """Answer a few prompts and forecast yield, tokens, dollars and hours of all of them, with intervals."""
    forecast: Pilot = pipeline.run_pilot(_recipe(recipe), options(**where), prompts)
    return forecast


def forget(prompt_ids: Sequence[str], reason: str, runs: Path | str = "runs", purge: bool = False) -> "Forgotten":
    """Remove every trace of these prompts from a run store's ledgers, leaving tombstones."""
    from distill.teachers.forgetting import forget as remove

    return remove(Path(runs), prompt_ids, reason, purge)


def select(recipe: Recipe | Path | str, **where: Unpack[Where]) -> Outcome:
    """Verify the traces and choose those that train; `outcome.results["select"]` is the training set."""
    return run(recipe, "select", **where)


def push_data_set(recipe: Recipe | Path | str, repo: str, private: bool = False, **where: Unpack[Where]) -> str:
    """Select, where that is not done, and upload the data set with its card to `USER/NAME` of the hub.

    Returns its address. Takes the token from HF_TOKEN. Raises RecipeError or DataError before any work for what cannot
    be pushed from here, DataError with the hub's own words if it refuses.
    """
    _late("distill.teachers.hub", "check_push")(repo)
    selected = select(recipe, **where).results["select"]
    return str(_late("distill.teachers.hub", "push")(selected, repo, private))


def train(recipe: Recipe | Path | str, **where: Unpack[Where]) -> Outcome:
    """Train the student through all its phases; the last of `train:0`, `train:1`, … is the model."""
    return run(recipe, "train", **where)


def push_model(recipe: Recipe | Path | str, repo: str, private: bool = False, **where: Unpack[Where]) -> str:
    """Train, where that is not done, and upload the last phase's checkpoint with its card to `USER/NAME` of the hub.

    Returns its address. Raises as `push_data_set` does.
    """
    check_push(repo)
    outcome = train(recipe, **where)
    *_, last = (step.label for step in outcome.plan.until("train") if step.stage == "train")
    if not launched().main:
        return ""  # the main process uploads
    return str(_late("distill.students.hub", "push")(outcome.results[last], repo, private))


def check(recipe: Recipe | Path | str, **where: Unpack[Where]) -> "list[Finding]":
    """Look for what would go wrong in the recipe's training: one finding a check, `failed` ones with what to do.

    Makes traces that are free where they are missing, and buys none.
    """
    return list(_late("distill.students.check", "check")(_recipe(recipe), options(**where)))


def evaluate(recipe: Recipe | Path | str, **where: Unpack[Where]) -> Outcome:
    """Measure teacher, base and student on the recipe's sets: `outcome.results["eval:student:heldout"]` and so on."""
    return run(recipe, "eval", **where)


def export_model(recipe: Recipe | Path | str, **where: Unpack[Where]) -> Outcome:
    """Make the ONNX artifact and hold it against the recipe's gates; `outcome.results["export"]` is the artifact."""
    return run(recipe, "export", **where)


def inspect(
    target: Recipe | Path | str,
    filters: Filters | None = None,
    overrides: Sequence[str] = (),
    runs: Path | str = "runs",
) -> list[Shown]:
    """Traces with their prompts, verdicts and flags, from a recipe, a pipeline, a stage folder or a `.jsonl` file."""
    return list(show(target, filters or Filters(), overrides, Path(runs)))


def write_viewer(
    target: Recipe | Path | str,
    out: Path | str,
    filters: Filters | None = None,
    overrides: Sequence[str] = (),
    runs: Path | str = "runs",
) -> "Written":
    """Write one self-contained HTML page of the traces that `inspect` gives: searchable, filterable, offline.

    All of a target's traces are in it unless `filters` say otherwise. Raises what `inspect` raises, RecipeError if
    `out` does not end in .html, StorageError if it cannot be written.
    """
    from distill.viewer import write_page

    asked = filters or Filters(limit=None)
    return write_page(show(target, asked, overrides, Path(runs)), Path(out), name_of(target), str(asked))


def verify(artifact: Path | str, golden: bool = True, public_key: Path | str | None = None) -> "list[Check]":
    """Check a shipped artifact: files, settings, bill of materials, card, signature, gates, golden prompts; one result
    a check.

    Raises ArtifactError at the first file that is not what the manifest says. `golden=False` loads no model;
    `public_key` is the PEM file that the signature must be of.
    """
    from distill.export.verify import verify_artifact

    return verify_artifact(Path(artifact), golden, Path(public_key) if public_key else None)


def sign(artifact: Path | str, key: Path | str | None = None) -> Path:
    """Sign an artifact with a private key: a PEM file, by default the one that DISTILL_SIGNING_KEY names.

    Returns the signature's path. Raises ArtifactError if the artifact is not what its manifest says.
    """
    from distill.export.signing import sign_artifact

    return sign_artifact(Path(artifact), Path(key) if key else None)


def write_report(recipe_or_run: Recipe | Path | str, out: Path | str | None = None, **where: Unpack[Where]) -> Path:
    """Write one self-contained HTML report of a recipe, a pipeline or a stage run; returns its path."""
    target = Path(recipe_or_run) if isinstance(recipe_or_run, str) else recipe_or_run
    written = _late("distill.report", "write_report")(target, options(**where), Path(out) if out else None)
    return Path(written)


def report_data(recipe_or_run: Recipe | Path | str, **where: Unpack[Where]) -> dict[str, Any]:
    """The numbers of the report as plain JSON values; a missing one has its reason beside it."""
    target = Path(recipe_or_run) if isinstance(recipe_or_run, str) else recipe_or_run
    return dict(_late("distill.report", "report_data")(target, options(**where)))


# --- sweeps and the run store ---------------------------------------------------------------------------------------


def plan_sweep(sweep: Path | str, **where: Unpack[Where]) -> "SweepForecast":
    """What a sweep would do: trials, distinct stages, what is done, seconds, dollars; runs nothing, writes nothing.

    Raises RecipeError, DataError or ModelError for a sweep or a trial that cannot run.
    """
    module: Any = importlib.import_module("distill.sweep.run")
    seen: SweepForecast = module.foresee(module.plan_sweep(sweep, options(**where)))
    return seen


def run_sweep(sweep: Path | str, executor: str = "local", **where: Unpack[Where]) -> "SweepOutcome":
    """Run a sweep's distinct stages, or go on with them; failed and pruned trials are in the outcome.

    Stages run in processes of their own (`local`) or as Ray tasks (`ray`). Raises LockedError if another driver runs
    it, RecipeError and its kin before anything is written.
    """
    outcome: SweepOutcome = _late("distill.sweep.run", "run_sweep")(sweep, options(**where), executor)
    return outcome


def sweep_results(sweep: Path | str, runs: Path | str = "runs") -> "SweepResults":
    """What the finished trials of a sweep came to: candidates, best first, fronts, comparisons, what mattered."""
    record = _late("distill.sweep.record", "read_record")(sweep, Path(runs))
    results: SweepResults = _late("distill.sweep.results", "read_results")(record)
    return results


def write_sweep_report(sweep: Path | str, out: Path | str | None = None, runs: Path | str = "runs") -> Path:
    """Write a sweep's report as one HTML page, with CSV and JSON beside it; returns the page's path."""
    record = _late("distill.sweep.record", "read_record")(sweep, Path(runs))
    return Path(_late("distill.sweep.report", "write_report")(record, Path(out) if out else None).html)


def ship(
    sweep: Path | str,
    where: Sequence[str] = (),
    least: str | None = None,
    most: str | None = None,
    trial: int | None = None,
    out: Path | str | None = None,
    runs: Path | str = "runs",
) -> Path:
    """Copy the artifact of the trial that passes `where` and has the least or most of a figure; returns the folder.

        distill.ship("sweep.yaml", ["accuracy>=0.8"], least="bytes")

    Raises GateError if no finished trial passes, RecipeError or RunError for what cannot ship.
    """
    module: Any = importlib.import_module("distill.sweep.ship")
    record = _late("distill.sweep.record", "read_record")(sweep, Path(runs))
    return Path(module.ship(record, module.choose(record, where, least, most, trial), Path(out) if out else None))


def compare(targets: Sequence[str], runs: Path | str = "runs") -> "Comparison":
    """Recipes, pipelines, stage folders or trials (`SWEEP:3`) side by side, paired with the first by problem."""
    found: Comparison = _late("distill.comparison", "compare")(targets, RunOptions(Path(runs)))
    return found


def list_runs(runs: Path | str = "runs") -> "list[StageFolder]":
    """Every stage run of a store, with its size and what it was made from."""
    return list(_late("distill.housekeeping", "list_runs")(Path(runs)))


def collect_garbage(names: Sequence[str] = (), delete: bool = False, runs: Path | str = "runs") -> "Collected":
    """Stage runs that nothing of these names needs (nothing at all, without names); `delete` removes them."""
    done: Collected = _late("distill.housekeeping", "collect")(Path(runs), names, delete)
    return done


def _late(module: str, name: str) -> Any:
    """A function of a module that needs optional packages, imported when it is called."""
    return getattr(importlib.import_module(module), name)
