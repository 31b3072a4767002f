"""A sweep on a real Ray cluster: the stages of the local executor, whichever node runs them, whichever is lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.config import load_recipe, recipe_from
from distill.errors import RunError
from distill.plan import make_plan
from distill.runs import RunOptions, open_sealed
from distill.sweep.parcels import (
    Parcel,
    local_paths,
    pack_path,
    pack_stage,
    relocated,
    unpack_path,
    unpack_stage,
)
from distill.sweep.record import read_events
from distill.sweep.run import run_sweep
from distill.sweep.schedule import Scheduler


def on_a_cluster(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that runs a cluster."""
    for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning"):  # Ray's own
        test = pytest.mark.filterwarnings(f"ignore::{kind}")(test)
    return pytest.mark.full(pytest.mark.timeout(600)(test))


def options(runs: Path) -> RunOptions:
    return RunOptions(runs, "cpu", quiet=True)


def digests(runs: Path) -> dict[str, str]:
    """Result digests of all finished stages."""
    documents = [json.loads(file.read_text()) for file in runs.glob("*/*/stage.json")]
    return {document["identity"]: document["digest"] for document in documents}


# --- parcels --------------------------------------------------------------------------------------------------------


def test_a_finished_stage_travels_whole_and_one_that_was_changed_on_the_way_is_refused(
    lab: Any, tmp_path: Path
) -> None:
    lab.write_light_recipe(tmp_path)
    run_sweep(lab.write_sweep(tmp_path), options(tmp_path / "runs"), lab.Inline())
    folder = next((tmp_path / "runs" / "prompts").iterdir())
    parcel = pack_stage(folder)
    unpack_stage(tmp_path / "other" / folder.name, parcel)
    assert open_sealed(tmp_path / "other" / folder.name).document == open_sealed(folder).document
    name = next(name for name, content in parcel.files.items() if len(content))
    torn = Parcel({**parcel.files, name: parcel.files[name][:-1]}, parcel.document)
    with pytest.raises(RunError, match=r"other bytes came than stage.json says"):
        unpack_stage(tmp_path / "third", torn)
    assert not (tmp_path / "third" / "stage.json").exists()
    with pytest.raises(RunError, match="not finished"):
        pack_stage(tmp_path / "third")


def test_files_of_a_recipe_lie_elsewhere_on_a_node_and_the_stages_are_the_same(lab: Any, tmp_path: Path) -> None:
    recipe = load_recipe(lab.write_light_recipe(tmp_path))
    named = local_paths(recipe)
    assert sorted(Path(one).name for one in named) == ["prompts.jsonl", "traces.jsonl"]
    places = {one: str(unpack_path(tmp_path / "node", one, pack_path(Path(one)))) for one in named}
    there = recipe_from(relocated(json.loads(recipe.model_dump_json()), places))
    assert all("/node/inputs/" in one for one in local_paths(there))
    runs = options(tmp_path / "runs")
    assert make_plan(there, runs).identity == make_plan(recipe, runs).identity
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "empty").touch()
    place = unpack_path(tmp_path / "node", str(tmp_path / "model"), pack_path(tmp_path / "model"))
    assert sorted(one.name for one in place.iterdir()) == ["config.json", "empty"]


# --- a real cluster -------------------------------------------------------------------------------------------------

TWELVE = {"select.limit": [2, 4, 6, 8, 10, 12], "prompts.0.split_seed": [0, 1]}


@on_a_cluster
def test_a_sweep_that_loses_a_node_midway_ends_as_the_local_one(lab: Any, tmp_path: Path, ray_cluster: Any) -> None:
    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(tmp_path, grid=TWELVE)
    run_sweep(path, options(tmp_path / "one"), lab.Inline())
    with ray_cluster.two_nodes() as second:
        lost = False

        def lose_a_node(scheduler: Scheduler) -> None:
            nonlocal lost
            if not lost and len(scheduler.summary.executed) >= 5:
                lost = True
                ray_cluster.kill(second)

        outcome = run_sweep(path, options(tmp_path / "runs"), "ray", lose_a_node)
        assert lost and second.returncode is not None
    assert outcome.done == outcome.trials == 12 and not outcome.failed_trials
    assert digests(tmp_path / "runs") == digests(tmp_path / "one")
    done = [event.identity for event in read_events(outcome.folder) if event.outcome == "done"]
    assert len(done) == len(set(done)) == outcome.stages
    assert run_sweep(path, options(tmp_path / "runs"), lab.Inline()).summary.executed == []


@on_a_cluster
def test_a_node_that_does_not_see_the_run_store_gets_what_it_reads_and_sends_back_what_it_made(
    lab: Any, tmp_path: Path, ray_cluster: Any
) -> None:
    lab.write_light_recipe(tmp_path / "driver")
    path = lab.write_sweep(tmp_path / "driver", grid=TWELVE)
    run_sweep(path, options(tmp_path / "one"), lab.Inline())
    # the second node sees an empty disk where the driver has recipe, problems and run store
    blind = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path / "driver"} && exec "$@"', "sh"]
    with ray_cluster.two_nodes(blind, DISTILL_NODE_RUNS=str(tmp_path / "node")):
        outcome = run_sweep(path, options(tmp_path / "driver" / "runs"), "ray")
    assert outcome.done == 12
    assert digests(tmp_path / "driver" / "runs") == digests(tmp_path / "one")
    there = digests(tmp_path / "node")
    assert there and there.items() <= digests(tmp_path / "one").items()
    logs = {log.stem.rpartition("-")[2] for log in (tmp_path / "node").glob("sweeps/*/logs/*.log")}
    assert logs, "the second node ran nothing"
    assert not logs & {log.stem.rpartition("-")[2] for log in (outcome.folder / "logs").glob("*.log")}
    assert sorted((tmp_path / "node" / "inputs").iterdir())
    assert not [one for one in logs if "generate" in one]


@on_a_cluster
def test_a_node_with_another_version_is_refused_by_name_before_any_work(
    lab: Any, tmp_path: Path, ray_cluster: Any
) -> None:
    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(tmp_path)
    older = tmp_path / "older" / "transformers-4.0.1.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.1\n")
    wanted = r"node [\d.]+ \(\w{8}\) has transformers 4\.0\.1 \(the driver has 5\.[\d.]+\); install the same"
    with ray_cluster.two_nodes(PYTHONPATH=str(tmp_path / "older")):
        with pytest.raises(RunError, match=wanted):
            run_sweep(path, options(tmp_path / "runs"), "ray")
    assert not list((tmp_path / "runs").glob("*/*/stage.json"))
