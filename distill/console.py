"""What all verbs of the command line have in common: options, tables and JSON on stdout, errors as exit codes."""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.errors import DistillError, Interrupted
from distill.interrupts import interruptible

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="section.key=value",
        help="Values that replace the recipe's; lists take an index: student.phases.0.lr=1e-5.",
        show_default=False,
    ),
]
RunsFolder = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Run store.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; run nothing and write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.")]
Threads = Annotated[int, typer.Option("--threads", metavar="N", min=0, help="CPU threads; 0 takes every core.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Partial = Annotated[
    bool, typer.Option("--accept-partial", help="Take the traces that are there as all there are; ask for none.")
]
Require = Annotated[bool, typer.Option("--require", help="Count a gate that could not run as failed.")]
PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="USER/NAME", help="Upload the result with its card; takes HF_TOKEN."),
]
Private = Annotated[bool, typer.Option("--private", help="With --push-to-hub: a new repository is private.")]


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with signals handled and errors turned into one line on stderr and an exit code.

    Anything that is not a DistillError is a bug and keeps its traceback.
    """

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with interruptible():
                verb(*args, **kwargs)
        except Interrupted as stop:
            _complain(str(stop))
            raise typer.Exit(stop.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except DistillError as error:
            _complain(f"error: {error}")
            raise typer.Exit(error.exit_code) from None

    return run


def _complain(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """A result for machines, on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table without colours or lines, so that it reads the same in a pipe."""
    widths = [max(len(row[column]) for row in [titles, *rows]) for column in range(len(titles))]
    for row in [titles, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
