"""distill: turn a large reasoning model into a small, cheap and proven one.

    import distill

    recipe = distill.load_recipe("recipe.yaml", ["student.phases.0.lr=1e-5"])
    print(distill.make_plan(recipe))
    outcome = distill.run(recipe, runs="runs")
    outcome.results["train:0"].counts

Every verb of the command line is a function here, with the same results: the command line calls these. Names are
imported on first use, so `import distill` is cheap.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Read by libraries when they are imported, so they must stand before any of them: onnxruntime and huggingface_hub
# report usage unless told not to; forked workers and a threaded tokenizer would warn of a deadlock and may meet it.
for _name, _value in {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distill.api import check as check
    from distill.api import collect_garbage as collect_garbage
    from distill.api import compare as compare
    from distill.api import evaluate as evaluate
    from distill.api import export_model as export_model
    from distill.api import forget as forget
    from distill.api import generate as generate
    from distill.api import generate_shard as generate_shard
    from distill.api import generate_shards as generate_shards
    from distill.api import inspect as inspect
    from distill.api import list_runs as list_runs
    from distill.api import make_plan as make_plan
    from distill.api import merge as merge
    from distill.api import pilot as pilot
    from distill.api import plan_sweep as plan_sweep
    from distill.api import push_data_set as push_data_set
    from distill.api import push_model as push_model
    from distill.api import run as run
    from distill.api import run_sweep as run_sweep
    from distill.api import score as score
    from distill.api import select as select
    from distill.api import ship as ship
    from distill.api import sweep_results as sweep_results
    from distill.api import train as train
    from distill.api import verify as verify
    from distill.api import write_report as write_report
    from distill.api import write_sweep_report as write_sweep_report
    from distill.api import write_viewer as write_viewer
    from distill.config import Recipe as Recipe
    from distill.config import load_recipe as load_recipe
    from distill.config import recipe_from as recipe_from
    from distill.errors import ArtifactError as ArtifactError
    from distill.errors import BudgetError as BudgetError
    from distill.errors import DataError as DataError
    from distill.errors import DistillError as DistillError
    from distill.errors import EngineError as EngineError
    from distill.errors import ExportError as ExportError
    from distill.errors import FormatError as FormatError
    from distill.errors import GateError as GateError
    from distill.errors import IncompleteError as IncompleteError
    from distill.errors import Interrupted as Interrupted
    from distill.errors import LockedError as LockedError
    from distill.errors import MissingExtraError as MissingExtraError
    from distill.errors import ModelError as ModelError
    from distill.errors import RecipeError as RecipeError
    from distill.errors import RunError as RunError
    from distill.errors import StorageError as StorageError
    from distill.errors import TrainingError as TrainingError
    from distill.pipeline import Outcome as Outcome
    from distill.plan import Plan as Plan
    from distill.records import Example as Example
    from distill.records import Flag as Flag
    from distill.records import Item as Item
    from distill.records import Message as Message
    from distill.records import Prompt as Prompt
    from distill.records import Trace as Trace
    from distill.records import Verdict as Verdict
    from distill.runs import RunOptions as RunOptions
    from distill.runs import SealedRun as SealedRun

_HOMES = {
    "distill.api": (
        "make_plan", "run", "generate", "generate_shard", "generate_shards", "merge", "pilot", "forget", "select",
        "push_data_set", "score", "check", "train", "push_model", "evaluate", "export_model", "inspect", "write_viewer",
        "verify", "write_report", "plan_sweep", "run_sweep", "sweep_results", "write_sweep_report", "ship", "compare",
        "list_runs", "collect_garbage",
    ),
    "distill.config": ("Recipe", "load_recipe", "recipe_from"),
    "distill.errors": (
        "ArtifactError", "BudgetError", "DataError", "DistillError", "EngineError", "ExportError", "FormatError",
        "GateError", "IncompleteError", "Interrupted", "LockedError", "MissingExtraError", "ModelError", "RecipeError",
        "RunError", "StorageError", "TrainingError",
    ),
    "distill.pipeline": ("Outcome",),
    "distill.plan": ("Plan",),
    "distill.records": ("Example", "Flag", "Item", "Message", "Prompt", "Trace", "Verdict"),
    "distill.runs": ("RunOptions", "SealedRun"),
}  # fmt: skip

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    """A public name, imported from its home on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
