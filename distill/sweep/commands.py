"""`distill sweep …`: run a sweep, look at it, report on it, ship from it; what is heavy is imported in the verbs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from distill.console import (
    AsJson,
    Device,
    DryRun,
    Private,
    PushToHub,
    Quiet,
    Require,
    RunsFolder,
    guarded,
    print_json,
    print_table,
)
from distill.errors import RecipeError

if TYPE_CHECKING:
    from distill.sweep.forecast import SweepForecast
    from distill.sweep.run import SweepOutcome

SweepTarget = Annotated[
    str, typer.Argument(metavar="SWEEP", help="A sweep's file, its folder in runs/sweeps/ or its name.")
]


class OrRun(TyperGroup):
    """A group whose first verb may be left out: `distill sweep FILE` is `distill sweep run FILE`."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        """Put `run` in front of what begins with no verb."""
        if arguments and arguments[0] not in (*self.commands, "-h", "--help"):
            arguments = ["run", *arguments]
        return super().parse_args(context, arguments)


app = typer.Typer(
    cls=OrRun,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run many recipes at once, shared stages once: distill sweep FILE, then status, report, ship.",
)


@app.command("run")
@guarded
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The sweep file.", show_default=False)],
    runs: RunsFolder = Path("runs"),
    dry_run: DryRun = False,
    executor: Annotated[
        str, typer.Option("--executor", metavar="NAME", help="Where stages run: local processes, or ray tasks.")
    ] = "local",
    device: Device = "auto",
    quiet: Quiet = False,
    require: Require = False,
    as_json: AsJson = False,
) -> None:
    """Run a sweep, or go on with it: `distill sweep FILE`. With --dry-run: trials, stages, time and dollars."""
    from distill.runs import RunOptions
    from distill.sweep.record import sweep_folder
    from distill.sweep.run import foresee, plan_sweep, raise_for, run_sweep
    from distill.sweep.view import shown

    options = RunOptions(runs, device, quiet=quiet, require=require)
    planned = plan_sweep(file, options)
    if dry_run:
        _print_forecast(foresee(planned), as_json, planned.file.sweep.limits.trials)
        return
    with shown(sweep_folder(planned.file.sweep.name, runs), runs, quiet) as view:
        outcome = run_sweep(file, options, executor, view)
    _print_outcome(outcome, as_json)
    raise_for(outcome)


def _print_forecast(seen: "SweepForecast", as_json: bool, limit: int | None) -> None:
    if as_json:
        print_json(seen.to_json())
        return
    from distill.progress import clock_text

    trials = f"{seen.proposed:,} trials to be proposed; each like the base recipe" if seen.proposed else (
        f"{seen.trials:,} trials" + (f", of which the first {limit:,} run" if limit and limit < seen.trials else "")
    )  # fmt: skip
    distinct, wanted = sum(row.distinct for row in seen.kinds), sum(row.wanted for row in seen.kinds)
    print(f"{seen.name}: {trials}; {distinct:,} distinct stages for the {wanted:,} that they take together")
    rows = [
        [row.kind, f"{row.wanted:,}", f"{row.distinct:,}", f"{row.done:,}", f"{row.owed:,}",
         "?" if row.seconds_each is None else clock_text(row.seconds_each)]
        for row in seen.kinds
    ]  # fmt: skip
    print_table(["stage", "wanted", "distinct", "done", "to run", "time each"], rows)
    if seen.seconds is None:
        print("time: not known; no such stage has finished in this run store yet")
    else:
        missing = f", without {', '.join(seen.untimed)}, of which none has finished yet" if seen.untimed else ""
        print(f"time: about {clock_text(seen.seconds)}{missing}")
    print("dollars: not known" if seen.dollars is None else f"dollars: at most {seen.dollars:,.2f}")


def _print_outcome(outcome: "SweepOutcome", as_json: bool) -> None:
    summary = outcome.summary
    if as_json:
        print_json({
            "name": outcome.name, "folder": str(outcome.folder), "trials": outcome.trials, "done": outcome.done,
            "failed": list(outcome.failed_trials), "pruned": list(outcome.pruned_trials), "left_out": outcome.left_out,
            "stages": outcome.stages, "executed": summary.executed, "stopped_at": summary.reason,
            "stage_seconds": round(summary.stage_seconds, 3), "wall_seconds": round(summary.wall_seconds, 3),
        })  # fmt: skip
        return
    parts = [f"{outcome.done} done"]
    parts += [f"{len(outcome.failed_trials)} failed"] if outcome.failed_trials else []
    parts += [f"{len(outcome.pruned_trials)} pruned"] if outcome.pruned_trials else []
    parts += [f"{outcome.left_out} left out"] if outcome.left_out else []
    print(
        f"{outcome.name}: of {outcome.trials} trials {', '.join(parts)}; {len(summary.executed)} of {outcome.stages}"
        f" distinct stages ran now, in {summary.wall_seconds:,.0f} s -> {outcome.folder}"
    )


@app.command("slurm")
@guarded
def slurm(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The sweep file.", show_default=False)],
    runs: RunsFolder = Path("runs"),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write array jobs for a Slurm cluster (untried on more than one node); submits nothing."""
    from distill.runs import RunOptions
    from distill.sweep.run import plan_sweep
    from distill.sweep.slurm import summary, write_scripts

    scripts = write_scripts(plan_sweep(file, RunOptions(runs, device)))
    if as_json:
        print_json({"submit": scripts.submit, "jobs": scripts.jobs, "arrays": [a._asdict() for a in scripts.arrays]})
    else:
        print("\n".join(summary(scripts)))


@app.command("status")
@guarded
def status(
    sweep: SweepTarget,
    live: Annotated[bool, typer.Option("--live", help="The table of a running sweep, renewed each second.")] = False,
    runs: RunsFolder = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Say how far a sweep is, from any shell: reads files only."""
    from distill.sweep.record import read_record
    from distill.sweep.view import Board, follow, headline, table_of

    record = read_record(sweep, runs)
    board = Board(record.folder, record.runs)
    if live and as_json:
        raise RecipeError("--live and --json: give one of the two")
    if live:
        follow(board)
        return
    rows, to_go = board.rows(record), board.to_go(record)
    if as_json:
        print_json({"name": record.name, "running": list(record.live.get("running", [])),
                    "seconds": round(record.attempts_s, 3), "to_go": to_go._asdict(), "spent_usd": record.spent_usd,
                    "trials": [row.to_json() for row in rows]})  # fmt: skip
        return
    print(headline(record, rows, to_go))
    print_table(*table_of(rows, record.sweep.objectives))
    for row in rows:
        if row.error:
            print(f"trial {row.number} failed in {row.stage}: {row.error}", file=sys.stderr)


@app.command("report")
@guarded
def report(
    sweep: SweepTarget,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where to write the HTML file.")] = None,
    runs: RunsFolder = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Write one HTML page: fronts, comparisons, what mattered, every trial; CSV and JSON beside it."""
    from distill.sweep.record import read_record
    from distill.sweep.report import write_report

    files = write_report(read_record(sweep, runs), out)
    if as_json:
        print_json(files._asdict())
    else:
        print(files.html)


@app.command("ship")
@guarded
def ship(
    sweep: SweepTarget,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="CONDITION", help="Such as accuracy>=0.8; may be repeated, all must hold."),
    ] = None,
    least: Annotated[str | None, typer.Option("--min", metavar="FIGURE", help="Take the least of it: bytes.")] = None,
    most: Annotated[str | None, typer.Option("--max", metavar="FIGURE", help="Take the most of it: accuracy.")] = None,
    trial: Annotated[int | None, typer.Option("--trial", metavar="N", help="Take this trial.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="New folder for what ships.")] = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    runs: RunsFolder = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which trial it is; copy nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take the artifact of the trial that fits best, with its lineage: --where "accuracy>=0.8" --min bytes."""
    from distill.hub import check_push
    from distill.sweep import ship as shipping
    from distill.sweep.record import read_record

    if private and not push_to_hub:
        raise RecipeError("--private goes with --push-to-hub USER/NAME")
    if push_to_hub:
        check_push(push_to_hub)
    record = read_record(sweep, runs)
    choice = shipping.choose(record, where or (), least, most, trial)
    folder = None if dry_run else shipping.ship(record, choice, out)
    address = shipping.push(folder, push_to_hub, private) if folder and push_to_hub else None
    if as_json:
        print_json({**shipping.choice_json(record, choice), "folder": folder and str(folder), "address": address})
        return
    figures = ", ".join(f"{title} {value:.6g}" for title, value in choice.figures.items() if value is not None)
    print(
        f"trial {choice.number}: {choice.by} of {len(choice.passed)} that pass, {choice.considered} finished; {figures}"
    )
    for place in (folder, address):
        if place:
            print(place)
