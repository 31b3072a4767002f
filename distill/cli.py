"""The `distill` command: a thin layer over `distill.api`; results become text or JSON, errors exit codes.

stdout holds the result, stderr the log and the progress. Exit codes: 0 done, 2 the user's error, 3 a gate, a budget or
a failed check, 130 and 143 after SIGINT and SIGTERM. Everything heavy is imported inside the verbs: `--help` loads
neither torch nor any other library of a stage.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill import __version__
from distill.console import (
    AsJson,
    Device,
    DryRun,
    Overrides,
    Partial,
    Private,
    PushToHub,
    Quiet,
    RecipePath,
    Require,
    RunsFolder,
    Threads,
    guarded,
    print_json,
    print_table,
)
from distill.errors import GateError, RecipeError, storage_errors
from distill.sweep.commands import app as sweeps

if TYPE_CHECKING:
    from distill.comparison import Comparison
    from distill.config import Recipe
    from distill.forecast import Row
    from distill.housekeeping import StageFolder
    from distill.pipeline import Outcome
    from distill.plan import Plan
    from distill.report.facts import Estimate
    from distill.report.scores import Score
    from distill.runs import RunOptions
    from distill.teachers.pilot import Pilot

app = typer.Typer(
    name="distill",
    help="Turn a large reasoning model into a small, cheap and proven one.",
    epilog="Grammar: distill VERB RECIPE.yaml section.key=value … Exit codes: 0 done, 2 your error, 3 a gate, budget or"
    " check failed, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

STAGE_VERBS = {
    "eval": ("eval", "Measure teacher, base and student on the recipe's sets, with intervals."),
    "export": ("export", "Make the ONNX artifact and hold each variant against the recipe's gates."),
    "run": (None, "Run all of the recipe's stages, resuming where it stopped."),
}
"""Verbs that run a recipe up to a stage (None: all of it)."""


def main() -> None:
    """The entry point."""
    app()


def _version(asked: bool) -> None:
    if asked:
        print(f"distill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# --- init -----------------------------------------------------------------------------------------------------------


@app.command("init")
@guarded
def init(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Which recipe; without it they are listed.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FILE", help="File to write; NAME.yaml by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one of the shipped recipes to start from; without a name, list them."""
    shipped = _shipped_recipes()
    if name is None:
        _list_shipped(shipped, as_json)
        return
    key = name.removesuffix(".yaml")
    if key not in shipped:
        raise RecipeError(
            f"no shipped recipe is called {name!r}{_nearest(key, shipped)}; choose one of {', '.join(shipped)}"
        )
    path = to or Path(f"{key}.yaml")
    with storage_errors(f"cannot write {path}"):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(shipped[key])
        except FileExistsError:
            raise RecipeError(
                f"{path}: exists already and is not overwritten; name another file with --to FILE"
            ) from None
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise RecipeError(
                f"{path}: cannot be written there: no such folder; make it, or name another --to FILE"
            ) from None
    if as_json:
        print_json({"recipe": key, "path": str(path)})
    else:
        print(f"{path}: written; look at its plan with: distill run {path} --dry-run")


def _shipped_recipes() -> dict[str, str]:
    """Text of every recipe in the package, by name."""
    from importlib.resources import files

    found = sorted((f for f in files("distill.configs").iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in found}


def _list_shipped(shipped: Mapping[str, str], as_json: bool) -> None:
    firsts = {name: text.partition("\n")[0].lstrip("# ") for name, text in shipped.items()}
    if as_json:
        print_json(firsts)
    else:
        print_table(["recipe", "what it does"], [[name, first] for name, first in firsts.items()])


def _nearest(name: str, names: Mapping[str, str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


# --- verbs that run stages ------------------------------------------------------------------------------------------


def _stage_command(stage: str | None) -> Callable[..., None]:
    """The command that runs a recipe up to `stage`."""

    def command(
        recipe: RecipePath,
        overrides: Overrides = None,
        runs: RunsFolder = Path("runs"),
        dry_run: DryRun = False,
        as_json: AsJson = False,
        device: Device = "auto",
        threads: Threads = 0,
        quiet: Quiet = False,
        require: Require = False,
        accept_partial: Partial = False,
    ) -> None:
        from distill import api
        from distill.config import load_recipe

        loaded = load_recipe(recipe, overrides or ())
        where: api.Where = {
            "runs": runs, "device": device, "threads": threads, "quiet": quiet, "require": require,
            "accept_partial": accept_partial,
        }  # fmt: skip
        if dry_run:
            _print_plan(api.make_plan(loaded, **where), stage, as_json)
        else:
            _print_outcome(api.run(loaded, stage, **where), stage, as_json)

    return command


for _verb, (_stage, _help) in STAGE_VERBS.items():
    app.command(_verb, help=_help)(guarded(_stage_command(_stage)))


@app.command("generate")
@guarded
def generate(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: RunsFolder = Path("runs"),
    pilot: Annotated[
        int | None,
        typer.Option("--pilot", metavar="N", min=1, help="Answer N prompts and forecast yield, dollars and hours."),
    ] = None,
    accept_partial: Partial = False,
    shard: Annotated[
        str | None,
        typer.Option("--shard", metavar="i/N", help="Answer one of N parts; `distill merge` puts them together."),
    ] = None,
    shards: Annotated[
        int, typer.Option("--shards", metavar="N", min=0, help="Answer N parts in processes of their own, then merge.")
    ] = 0,
    executor: Annotated[
        str, typer.Option("--executor", metavar="NAME", help="Where --shards run: local processes, or ray tasks.")
    ] = "local",
    dry_run: DryRun = False,
    as_json: AsJson = False,
    device: Device = "auto",
    threads: Threads = 0,
    quiet: Quiet = False,
) -> None:
    """Let the teacher answer the prompts: verified reasoning traces, no answer bought twice."""
    from distill import api
    from distill.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    where: api.Where = {
        "runs": runs, "device": device, "threads": threads, "quiet": quiet, "accept_partial": accept_partial,
    }  # fmt: skip
    given = {"--pilot": pilot, "--shard": shard, "--shards": shards, "--accept-partial": accept_partial}
    if len(named := [name for name, value in given.items() if value]) > 1:
        raise RecipeError(f"{' and '.join(named)}: give one of them")
    if dry_run:
        _print_plan(api.make_plan(loaded, **where), "generate", as_json)
    elif pilot:
        _print_pilot(api.pilot(loaded, pilot, **where), as_json)
    elif shard:
        _print_shard(api.generate_shard(loaded, shard, **where), as_json)
    elif shards:
        _print_outcome(api.generate_shards(loaded, shards, executor, **where), "generate", as_json)
    else:
        _print_outcome(api.generate(loaded, **where), "generate", as_json)


def _print_pilot(pilot: "Pilot", as_json: bool) -> None:
    from distill.teachers.pilot import as_text

    if as_json:
        print_json(pilot.to_json())
    else:
        print(as_text(pilot))


def _print_shard(counts: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(counts)
    else:
        print(", ".join(f"{key} {value}" for key, value in counts.items()))


@app.command("score")
@guarded
def score(
    source: Annotated[
        Path, typer.Argument(metavar="RECIPE.yaml|TRACES", help="A recipe, or a file of traces.", show_default=False)
    ],
    overrides: Overrides = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="MODEL", help="For a file of traces: the model that scores them."),
    ] = None,
    runs: RunsFolder = Path("runs"),
    dry_run: DryRun = False,
    as_json: AsJson = False,
    device: Device = "auto",
    threads: Threads = 0,
    quiet: Quiet = False,
    accept_partial: Partial = False,
) -> None:
    """Store teachers' distributions over traces: those of a recipe with logprobs, or of a file.

    A file (.jsonl, .json, .parquet) has columns question and response; prompts.0, teacher.recorded, logprobs and format
    take overrides as in a recipe: teacher.recorded.response_column=text, logprobs.form=topk.
    """
    from distill import api
    from distill.config import load_recipe, traces_recipe

    if source.suffix in (".yaml", ".yml"):
        if teacher:
            raise RecipeError("--teacher is for a file of traces; a recipe names its teachers in logprobs.teachers")
        loaded = load_recipe(source, overrides or ())
    else:
        if not teacher:
            raise RecipeError(f"{source}: a file of traces takes --teacher MODEL, the model that scores them")
        loaded = traces_recipe(source, teacher, overrides or ())
    where: api.Where = {
        "runs": runs, "device": device, "threads": threads, "quiet": quiet, "accept_partial": accept_partial,
    }  # fmt: skip
    if dry_run:
        _print_plan(api.make_plan(loaded, **where), "score", as_json)
    else:
        _print_outcome(api.score(loaded, **where), "score", as_json)


@app.command("select")
@guarded
def select(
    recipe: RecipePath,
    overrides: Overrides = None,
    reverify: Annotated[
        bool, typer.Option("--reverify", help="Verify all stored traces again and say which verdicts changed.")
    ] = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    runs: RunsFolder = Path("runs"),
    dry_run: DryRun = False,
    as_json: AsJson = False,
    device: Device = "auto",
    threads: Threads = 0,
    quiet: Quiet = False,
    require: Require = False,
    accept_partial: Partial = False,
) -> None:
    """Verify the traces and choose those that train; every drop is counted and explained."""
    from distill import api
    from distill.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    where: api.Where = {
        "runs": runs, "device": device, "threads": threads, "quiet": quiet, "require": require,
        "accept_partial": accept_partial,
    }  # fmt: skip
    if reverify and push_to_hub:
        raise RecipeError("--reverify and --push-to-hub: give one of them")
    _check_private(private, push_to_hub)
    if dry_run:
        _print_plan(api.make_plan(loaded, **where), "select", as_json)
    elif reverify:
        _reverify(loaded, api.options(**where), as_json)
    elif push_to_hub:
        _print_address("data_set", api.push_data_set(loaded, push_to_hub, private, **where), as_json)
    else:
        _print_outcome(api.select(loaded, **where), "select", as_json)


def _reverify(recipe: "Recipe", options: "RunOptions", as_json: bool) -> None:
    from distill.teachers.reverify import reverify

    comparison = reverify(recipe, options)
    if as_json:
        print_json(comparison.to_json())
    else:
        print_table(["before", "now", "traces"], [[*names, f"{count:,}"] for *names, count in comparison.rows])


def _check_private(private: bool, push_to_hub: str | None) -> None:
    if private and not push_to_hub:
        raise RecipeError("--private goes with --push-to-hub USER/NAME")


def _print_address(what: str, address: str, as_json: bool) -> None:
    if as_json:
        print_json({what: address})
    else:
        print(address)


@app.command("train")
@guarded
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    runs: RunsFolder = Path("runs"),
    dry_run: DryRun = False,
    as_json: AsJson = False,
    device: Device = "auto",
    threads: Threads = 0,
    quiet: Quiet = False,
    require: Require = False,
    accept_partial: Partial = False,
) -> None:
    """Train the student on the selected traces, resuming from its last checkpoint."""
    from distill import api
    from distill.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    where: api.Where = {
        "runs": runs, "device": device, "threads": threads, "quiet": quiet, "require": require,
        "accept_partial": accept_partial,
    }  # fmt: skip
    _check_private(private, push_to_hub)
    if dry_run:
        _print_plan(api.make_plan(loaded, **where), "train", as_json)
    elif push_to_hub:
        if address := api.push_model(loaded, push_to_hub, private, **where):
            _print_address("model", address, as_json)
    else:
        _print_outcome(api.train(loaded, **where), "train", as_json)


@app.command("merge")
@guarded
def merge(
    recipe: RecipePath,
    overrides: Overrides = None,
    others: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="DIR", help="Another run store whose answers are taken over; may be repeated."),
    ] = None,
    runs: RunsFolder = Path("runs"),
    accept_partial: Partial = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Put together what the shards of a generate run have answered; asks the teacher for nothing."""
    from distill import api
    from distill.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    outcome = api.merge(loaded, others or (), runs=runs, quiet=quiet, accept_partial=accept_partial)
    _print_outcome(outcome, "generate", as_json)


@app.command("forget")
@guarded
def forget(
    prompt_ids: Annotated[list[str], typer.Argument(metavar="PROMPT_ID…", help="As `distill inspect` shows them.")],
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Kept in the tombstone.")],
    purge: Annotated[
        bool, typer.Option("--purge", help="Also delete sealed stage runs that hold copies; they can be made again.")
    ] = False,
    runs: RunsFolder = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Remove every trace of these prompts from the ledgers; they are never asked again."""
    from distill import api

    done = api.forget(prompt_ids, reason, runs, purge)
    if as_json:
        print_json(done._asdict())
        return
    print(f"{done.prompts} prompts removed, {done.lines} lines cut out of ledgers")
    for stage in done.stages:
        print(f"{stage}: {'deleted' if purge else 'still holds copies; --purge deletes it'}")


def _print_plan(plan: "Plan", stage: str | None, as_json: bool) -> None:
    from distill.forecast import forecast, plan_json

    wanted = {step.label for step in plan.until(stage)} if stage else set(plan.steps)
    rows = [row for row in forecast(plan) if row.label in wanted]
    if as_json:
        print_json(plan_json(plan, rows))
        return
    print(f"{plan.recipe.name}: {len(rows)} stages, pipeline {plan.identity}")
    print_table(["stage", "identity", "state", "tokens at most", "why"], [_cells(row) for row in rows])
    for what in dict.fromkeys(what for row in rows for what in row.unresolved):
        name, _, revision = what.rpartition("@unresolved:")
        print(f"unresolved: {name or what} at {revision}: no hub answers; the commit, once known, changes identities")


def _cells(row: "Row") -> list[str]:
    tokens = "?" if row.tokens is None else f"{row.tokens:,}" if row.tokens else "-"
    return [row.label, row.identity, row.state, tokens, row.why]


def _print_outcome(outcome: "Outcome", stage: str | None, as_json: bool) -> None:
    from distill.api import options
    from distill.plan import pipeline_file
    from distill.processes import launched

    if not launched().main:
        return

    stages = {
        label: {
            "folder": str(sealed.folder),
            "ran_now": label in outcome.executed,
            "digest": sealed.digest,
            "seconds": sealed.seconds,
            "counts": sealed.counts,
        }
        for label, sealed in outcome.results.items()
    }
    if as_json:
        runs = next(iter(outcome.plan.steps.values())).runs if outcome.plan.steps else options().runs
        record = pipeline_file(outcome.plan, runs)
        print_json({"name": outcome.plan.recipe.name, "pipeline": str(record), "stages": stages})
        return
    rows = [
        [label, "ran" if made["ran_now"] else "cached", f"{made['seconds']:,.1f} s", _counts(made["counts"])]
        for label, made in stages.items()
    ]
    print_table(["stage", "", "time", "counts"], rows)


def _counts(counts: Any, most: int = 6) -> str:
    """An evaluation's accuracy with its interval, or the first plain numbers of another stage's counts."""
    if counts.get("available"):
        interval = f"{counts['accuracy_low']:.1%} to {counts['accuracy_high']:.1%}"
        return f"accuracy {counts['accuracy']:.1%} ({interval}) on {counts['problems']} problems"
    plain = {k: v for k, v in counts.items() if isinstance(v, int | float | str)}
    return ", ".join(
        f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value:,}" if isinstance(value, int)
        else f"{key} {value}"
        for key, value in list(plain.items())[:most]
    )  # fmt: skip


# --- verbs that read what is there ----------------------------------------------------------------------------------


@app.command("report")
@guarded
def report(
    target: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A recipe, a pipeline (runs/pipelines/*.json) or a stage folder."),
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where to write the HTML file.")] = None,
    runs: RunsFolder = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML report: traces, loss, accuracy with intervals, size, speed, examples."""
    from distill import api
    from distill.config import load_recipe

    is_recipe = target.suffix in (".yaml", ".yml")
    if overrides and not is_recipe:
        raise RecipeError(f"{overrides[0]!r}: overrides go with a recipe; {target} is what a run left")
    source = load_recipe(target, overrides or ()) if is_recipe else target
    path = api.write_report(source, out, runs=runs)
    if as_json:
        print_json({"report": str(path), **api.report_data(source, runs=runs)})
    else:
        print(path)


@app.command("inspect")
@guarded
def inspect(
    target: Annotated[
        Path,
        typer.Argument(metavar="RUN|TRACES", help="A recipe, a pipeline, a stage folder or a .jsonl file of traces."),
    ],
    overrides: Overrides = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only answers judged wrong.")] = False,
    correct: Annotated[bool, typer.Option("--correct", help="Only answers judged correct.")] = False,
    truncated: Annotated[bool, typer.Option("--truncated", help="Only texts that were cut.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Only requests that got no answer.")] = False,
    key: Annotated[str | None, typer.Option("--key", metavar="ID", help="Start of a prompt or trace id.")] = None,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="LABEL", help="Stage to show: select, eval:student:heldout, …")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=0, help="Show at most N, 10 by default; 0 shows all, as --html does."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Show long texts whole.")] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page to search, filter and read in a browser."),
    ] = None,
    runs: RunsFolder = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show traces readably: prompt, reasoning, answer, verdict, flags."""
    from distill import api
    from distill.inspection import SHOWN_AT_FIRST, Filters, as_text

    if limit is None:
        limit = 0 if html else SHOWN_AT_FIRST
    filters = Filters(wrong, correct, truncated, failed, key, limit or None, stage)
    if html:
        page = api.write_viewer(target, html, filters, overrides or (), runs)
        if as_json:
            print_json(page._asdict())
        else:
            print(page.path)
            print(f"traces: {page.traces:,}; {page.bytes / 1e6:,.1f} MB; open it in a browser", file=sys.stderr)
        return
    shown = api.inspect(target, filters, overrides or (), runs)
    if as_json:
        print_json([one.to_json() for one in shown])
        return
    for number, one in enumerate(shown, 1):
        print(as_text(one, number, whole=full))
    print(f"{len(shown)} shown" + ("; --limit N shows more" if limit and len(shown) == limit else ""), file=sys.stderr)


@app.command("verify")
@guarded
def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of an exported artifact.")],
    no_golden: Annotated[bool, typer.Option("--no-golden", help="Load no model; golden prompts are not run.")] = False,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", metavar="KEY.pem", help="Key that the signature must be of.")
    ] = None,
    require: Annotated[bool, typer.Option("--require", help="Count a check that could not run as failed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a shipped artifact: every file's hash, settings, bill of materials, card, signature, gates, golden prompts.

    Needs neither torch nor transformers.
    """
    from distill import api
    from distill.export.verify import refuse_failed, summary

    checks = api.verify(artifact, golden=not no_golden, public_key=public_key)
    if as_json:
        print_json([check._asdict() for check in checks])
    else:
        rows = [[check.name, check.status.replace("_", " "), check.detail] for check in checks]
        print_table(["check", "result", "detail"], rows)
        print(f"\n{summary(checks)}")
    refuse_failed(checks, require)


@app.command("sign")
@guarded
def sign(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder of an exported artifact.")],
    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="KEY.pem", help="Private key; by default the one DISTILL_SIGNING_KEY names."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sign an artifact with a private key, over all of its files; `verify --public-key` checks the signature."""
    from distill import api

    signature = api.sign(artifact, key)
    if as_json:
        print_json({"signature": str(signature)})
    else:
        print(signature)


@app.command("check")
@guarded
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    runs: RunsFolder = Path("runs"),
    as_json: AsJson = False,
    device: Device = "auto",
    threads: Threads = 0,
    quiet: Quiet = False,
) -> None:
    """Look for what would go wrong in the training: reasoning, ends, lengths, packing, a probe, time and memory."""
    from distill import api
    from distill.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    found = api.check(loaded, runs=runs, device=device, threads=threads, quiet=quiet)
    if as_json:
        print_json([one._asdict() for one in found])
    else:
        print_table(["check", "result", "detail"], [[one.name, one.status, one.detail] for one in found])
    if failed := [one.name for one in found if one.status == "failed"]:
        raise GateError(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}")


@app.command("doctor")
@guarded
def doctor(
    runs: RunsFolder = Path("runs"),
    device: Device = "auto",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Say what this installation can do: versions, devices, attention, missing extras, hub state, disk space."""
    from distill.doctor import as_text, examine
    from distill.runs import RunOptions

    found = examine(RunOptions(runs, device, threads))
    if as_json:
        print_json(found)
    else:
        print(as_text(found))


app.add_typer(sweeps, name="sweep")


# --- the run store as a whole ---------------------------------------------------------------------------------------


@app.command("compare")
@guarded
def compare(
    targets: Annotated[
        list[str], typer.Argument(metavar="RUN…", help="Recipes, pipelines, stage folders, or SWEEP:TRIAL.")
    ],
    runs: RunsFolder = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Lay runs side by side: accuracy with paired differences from the first, size, speed, money, what differs."""
    from distill.comparison import compare as laid_out
    from distill.runs import RunOptions

    found = laid_out(targets, RunOptions(runs))
    if as_json:
        print_json(found.to_json())
    else:
        _print_comparison(found)


def _print_comparison(found: "Comparison") -> None:
    from distill.progress import clock_text

    rows = [
        [row.model, row.set, *map(_score_cell, row.scores, row.minus_first)]
        for row in found.rows
        if any(score and score.accuracy for score in row.scores)
    ]
    rows.append(["time", "", *map(clock_text, found.seconds)])
    if any(usd is not None for usd in found.dollars):
        rows.append(["dollars", "", *("-" if usd is None else f"{usd:,.2f}" for usd in found.dollars)])
    print_table(["model", "set", *found.names], rows)
    if found.differing:
        print_table(
            ["differs", "", *found.names], [[key, "", *map(str, each)] for key, each in found.differing.items()]
        )


def _score_cell(score: "Score | None", minus: "Estimate | None") -> str:
    if score is None or score.accuracy is None:
        return "-"
    text = f"{score.accuracy.value:.1%} ({score.accuracy.low:.1%} to {score.accuracy.high:.1%})"
    text += f", {score.megabytes:,.1f} MB" if score.megabytes is not None else ""
    if minus is None:
        return text
    return f"{text}, {100 * minus.value:+.1f} ({100 * minus.low:+.1f} to {100 * minus.high:+.1f})"


@app.command("runs")
@guarded
def list_runs(
    run: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="A stage run, by folder or identity: what it is made of."),
    ] = None,
    runs: RunsFolder = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the stage runs of a store with state, size and time; of one, the tree of what it was made from."""
    from distill import housekeeping

    found = housekeeping.list_runs(runs)
    shown = list(housekeeping.tree(found, housekeeping.find_run(found, run))) if run else [(0, one) for one in found]
    if as_json:
        print_json([{**one.to_json(), "depth": depth} for depth, one in shown])
        return
    rows = [[f"{'  ' * depth}{one.folder.parent.name}/{one.folder.name}", *_run_cells(one)] for depth, one in shown]
    print_table(["run", "state", "size", "time", "finished"], rows)
    print(f"{len(shown)} stage runs, {_size(sum({one.folder: one.bytes for _, one in shown}.values()))}")


def _run_cells(one: "StageFolder") -> list[str]:
    from distill.progress import clock_text

    seconds = one.document.get("seconds")
    finished = str(one.document.get("finished") or "")[:16].replace("T", " ")
    return [one.state, _size(one.bytes), "-" if seconds is None else clock_text(seconds), finished]


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


@app.command("gc")
@guarded
def collect(
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="NAME",
            help="A sweep, recipe, pipeline or artifact to keep; may be repeated. Without, all there are are kept.",
        ),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it they are only listed.")] = False,
    runs: RunsFolder = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Find stage runs that nothing with a name needs; the ledger of paid answers is never touched."""
    from distill.housekeeping import collect as collect_garbage

    done = collect_garbage(runs, keep or (), delete)
    if as_json:
        folders = {name: [str(one.folder) for one in getattr(done, name)] for name in ("removed", "busy")}
        needed_by = [one._asdict() | {"identities": sorted(one.identities)} for one in done.needed_by]
        print_json({"deleted": delete, "bytes": done.bytes, "kept": done.kept, "needed_by": needed_by, **folders})
        return
    rows = [[f"{one.folder.parent.name}/{one.folder.name}", *_run_cells(one)] for one in done.removed]
    print_table(["run", "state", "size", "time", "finished"], rows)
    for one in done.busy:
        print(f"{one.folder}: not needed, but being written now; left alone", file=sys.stderr)
    what = "deleted" if delete else "can go; --delete deletes them"
    print(f"{len(done.removed)} stage runs, {_size(done.bytes)}, {what}; {done.kept} are needed")
    for need in done.needed_by:
        print(f"  kept for {need}")
    if not keep and not done.removed and done.kept:
        print("all that has a name is kept; `distill gc --keep NAME` keeps only what NAME needs")


# --- an artifact at work ----------------------------------------------------------------------------------------------

Artifact = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="Folder of an exported artifact.", show_default=False)
]
VariantOption = Annotated[
    str | None,
    typer.Option("--variant", metavar="NAME", help="fp32, int8, int4 …; by default the artifact's own choice."),
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", min=0, max=2, help="0 takes the likeliest token.")
]
TopP = Annotated[
    float, typer.Option("--top-p", metavar="P", min=0.001, max=1, help="Share of the likeliest tokens drawn from.")
]


@app.command("chat")
@guarded
def chat(
    artifact: Artifact,
    variant: VariantOption = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Most tokens of an answer.")
    ] = 1024,
    think_budget: Annotated[
        int | None, typer.Option("--think-budget", metavar="N", min=0, help="Most tokens of reasoning.")
    ] = None,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of every answer.")] = 0,
    threads: Threads = 0,
) -> None:
    """Talk to an artifact in the terminal; with stdin from a pipe, every line is a message."""
    from distill.export.chat import Settings, run

    settings = Settings(max_new_tokens, temperature, top_p, seed, think_budget)
    run(artifact, settings, system, variant=variant, threads=threads)


@app.command("serve")
@guarded
def serve(
    artifact: Artifact,
    variant: VariantOption = None,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_prompt_tokens: Annotated[
        int, typer.Option("--max-prompt-tokens", metavar="N", min=1, help="A longer chat is refused.")
    ] = 4096,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Most tokens of one answer.")
    ] = 2048,
    max_rows: Annotated[int, typer.Option("--max-rows", metavar="N", min=1, help="Texts written at once.")] = 64,
    max_queue: Annotated[
        int, typer.Option("--max-queue", metavar="N", min=0, help="Requests that may wait; more are refused with 429.")
    ] = 128,
    max_body: Annotated[int, typer.Option("--max-body", metavar="BYTES", min=1, help="Largest request.")] = 1 << 20,
    max_connections: Annotated[int, typer.Option("--max-connections", metavar="N", min=1, help="Open at once.")] = 512,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="S", min=0.1, help="Seconds for a whole answer.")
    ] = 600,
    read_timeout: Annotated[
        float,
        typer.Option("--read-timeout", metavar="S", min=0.1, help="Seconds for headers, and for a body, to arrive."),
    ] = 10,
    drain: Annotated[
        float, typer.Option("--drain", metavar="S", min=0, help="Seconds that running answers have after SIGTERM.")
    ] = 30,
    cache_gb: Annotated[
        float, typer.Option("--cache-gb", metavar="GB", min=0.01, help="Memory for keys and values.")
    ] = 4.0,
    allow_origin: Annotated[
        str, typer.Option("--allow-origin", metavar="ORIGIN", help="Let pages of this origin ask (CORS).")
    ] = "",
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    threads: Threads = 0,
) -> None:
    """Serve an artifact as OpenAI's API, with a page to chat in; the environment's DISTILL_SERVE_API_KEY is its key."""
    import os

    from distill.export.serve import KEY_VARIABLE, run
    from distill.export.serve_limits import Limits

    limits = Limits(
        body_bytes=max_body, prompt_tokens=max_prompt_tokens, new_tokens=max_new_tokens, queue=max_queue, rows=max_rows,
        request_s=timeout, read_s=read_timeout, connections=max_connections, drain_s=drain, cache_gb=cache_gb,
    )  # fmt: skip
    run(
        artifact, host, port, os.environ.get(KEY_VARIABLE, ""), limits, variant=variant, threads=threads,
        origin=allow_origin, temperature=temperature, top_p=top_p,
    )  # fmt: skip


@app.command("bench")
@guarded
def bench(
    artifact: Artifact,
    variant: VariantOption = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Medians are taken over so many.")] = 3,
    threads: Threads = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure an artifact on this machine: first token, tokens a second, batches, time to load, peak memory."""
    from distill.export import bench as measuring

    result = measuring.bench(artifact, variant, threads, rounds, quiet)
    if as_json:
        print_json(result)
        return
    print_table(["measured", "median", "rounds"], measuring.as_rows(result))
    machine, versions = result["machine"], ", ".join(f"{name} {one}" for name, one in result["versions"].items())
    print(
        f"{result['artifact']} {result['variant']}, {result['threads']} threads on {machine['processor']}; {versions}"
    )


if __name__ == "__main__":
    main()
