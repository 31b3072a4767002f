"""Running sweeps: each distinct stage once, within the resources, whatever fails, dies, stops or is added later."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.errors import BudgetError, IncompleteError, Interrupted, LockedError, RecipeError
from distill.runs import RunOptions, locked
from distill.sweep.config import Resources
from distill.sweep.executors import LocalExecutor
from distill.sweep.forecast import Work, wall_time
from distill.sweep.record import Events, read_events, read_record
from distill.sweep.resources import Grant, gpu_count
from distill.sweep.run import SweepOutcome, plan_sweep, raise_for, run_sweep
from distill.sweep.schedule import Scheduler, job_of
from distill.sweep.work import Ended, Job, run_job

STUDENT = """
prompts:
  - {name: sums, reasoning_gym: {task: basic_arithmetic, size: 400, seed: 7}, heldout: 64}
teacher: {engine: solver}
student: {init: nobody/model, revision: "0000000000000000000000000000000000000000", phases: [{kind: sft}]}
evaluate: {models: [base, student]}
export: {variants: [int4]}
"""


@pytest.fixture
def student_sweep(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a sweep over a recipe with a student; its stages are only for executors that seal."""

    def write(recipe: str = STUDENT, **sections: Any) -> Path:
        (tmp_path / "recipe.yaml").write_text(recipe)
        path = tmp_path / "sweep.yaml"
        path.write_text(json.dumps({"recipe": "recipe.yaml", **sections}))
        return path

    return write


def options(tmp_path: Path) -> RunOptions:
    return RunOptions(tmp_path / "runs", "cpu", quiet=True)


def executed(outcome: SweepOutcome) -> list[str]:
    return [one.split()[0] for one in outcome.summary.executed]


# --- what runs ------------------------------------------------------------------------------------------------------


def test_each_distinct_stage_runs_once_and_a_second_run_does_nothing(lab: Any, tmp_path: Path) -> None:
    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(tmp_path, grid={"select.limit": [5, 10, 15]})
    outcome = run_sweep(path, options(tmp_path), lab.Inline())
    assert outcome.done == outcome.trials == 3
    assert sorted(executed(outcome)) == sorted(["prompts", "generate", "eval:teacher:heldout", *["select"] * 3])
    assert len(outcome.summary.executed) == outcome.stages == len(list((tmp_path / "runs").glob("*/*/stage.json")))
    again = run_sweep(path, options(tmp_path), lab.Inline())
    assert again.done == 3 and again.summary.executed == []


def test_a_trial_that_is_added_later_reuses_everything(lab: Any, tmp_path: Path) -> None:
    lab.write_light_recipe(tmp_path)
    run_sweep(lab.write_sweep(tmp_path, grid={"select.limit": [5]}), options(tmp_path), lab.Inline())
    path = lab.write_sweep(tmp_path, grid={"select.limit": [3, 5]})
    outcome = run_sweep(path, options(tmp_path), lab.Inline())
    assert executed(outcome) == ["select"] and outcome.done == 2
    record = read_record(path, tmp_path / "runs")
    assert {number: record.trial(number).overrides["select.limit"] for number in record.numbers} == {0: 5, 1: 3}


def test_stages_run_at_once_within_the_slots_and_get_their_threads(
    lab: Any, tmp_path: Path, student_sweep: Callable[..., Path]
) -> None:
    path = student_sweep(
        grid={"student.phases.0.lr": [1e-4, 2e-4, 3e-4, 4e-4]},
        resources={"cpus": 4, "stages": {"train": {"cpus": 2}, "eval": {"cpus": 1}}},
    )
    executor = lab.Scripted()
    outcome = run_sweep(path, options(tmp_path), executor)
    assert outcome.done == 4 and executor.most_cpus == 4 and executor.most_at_once >= 2
    assert {job.threads for job in executor.jobs if job.label == "train:0"} == {2}
    assert {job.threads for job in executor.jobs if job.label in ("prompts", "select")} == {1}
    assert max(executor.started.values()) == 1


def test_a_stage_that_runs_while_others_end_is_not_begun_again(
    lab: Any, tmp_path: Path, student_sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = student_sweep(grid={"student.phases.0.lr": [1e-4, 2e-4]}, resources={"cpus": 8})
    executor = lab.Scripted()
    monkeypatch.setattr(executor, "looks_of", lambda job: 12 if job.label.startswith("eval:base") else 1)
    outcome = run_sweep(path, options(tmp_path), executor)
    assert outcome.done == 2 and executor.most_at_once >= 2
    assert max(executor.started.values()) == 1 and len(executor.started) == outcome.stages


def test_memory_and_gpus_bound_what_runs_at_once(lab: Any, tmp_path: Path, student_sweep: Callable[..., Path]) -> None:
    path = student_sweep(
        grid={"student.phases.0.lr": [1e-4, 2e-4, 3e-4]},
        resources={"cpus": 64, "memory_gb": 10, "gpus": 2,
                   "stages": {"train": {"cpus": 1, "memory_gb": 6}, "eval": {"gpus": 0}}},
    )  # fmt: skip
    most: list[int] = []

    def script(job: Job, _: int) -> None:
        most.append(sum(job.label == "train:0" for job, _ in executor.running.values()))

    executor = lab.Scripted(script)
    run_sweep(path, options(tmp_path), executor)
    assert max(most) == 1
    assert {job.gpus for job in executor.jobs if job.label == "train:0"} <= {(0,), (1,)}
    assert {job.gpus for job in executor.jobs if job.label.startswith(("eval", "select"))} == {()}
    assert executor.jobs[-1].environment.keys() >= {"OMP_NUM_THREADS"}


def test_a_stage_sees_the_gpus_that_it_was_given_by_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("train:0", "i", "{}", ".", "runs", "auto", 2, (1,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert gpu_count(Resources()) == 2 and gpu_count(Resources(gpus=1)) == 1
    assert job.environment["CUDA_VISIBLE_DEVICES"] == "GPU-b"
    assert replace(job, gpus=()).environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in replace(job, gpus=None).environment
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_count(Resources()) == 0


def test_the_first_trial_comes_to_its_end_first(lab: Any, tmp_path: Path, student_sweep: Callable[..., Path]) -> None:
    path = student_sweep(grid={"student.phases.0.lr": [1e-4, 2e-4]}, resources={"cpus": 1})
    executor = lab.Scripted(looks=1)
    run_sweep(path, options(tmp_path), executor)
    assert (
        executor.order[:4] == ["prompts", "eval:base:heldout", "generate", "select"] or executor.order[0] == "prompts"
    )
    assert executor.order.index("export") < len(executor.order) - 3


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_failed_trial_is_recorded_and_the_others_go_on(
    lab: Any, tmp_path: Path, student_sweep: Callable[..., Path]
) -> None:
    path = student_sweep(grid={"student.phases.0.lr": [1e-4, 2e-4]})

    def script(job: Job, _: int) -> Ended | None:
        broken = job.label == "train:0" and json.loads(job.recipe)["student"]["phases"][0]["lr"] == 1e-4
        return Ended(job.identity, "failed", "the loss is not finite", 2) if broken else None

    outcome = run_sweep(path, options(tmp_path), lab.Scripted(script))
    assert (outcome.done, outcome.failed_trials) == (1, (0,))
    record = read_record(path, tmp_path / "runs")
    assert [record.state_of(number) for number in record.numbers] == ["failed", "done"]
    failure = record.failure_of(0)
    assert failure and failure.label == "train:0" and failure.error == "the loss is not finite"
    with pytest.raises(IncompleteError, match="1 of 2 trials failed, the first, 0, in train:0: the loss is not finite"):
        raise_for(outcome)
    mended = run_sweep(path, options(tmp_path), lab.Scripted())
    assert mended.done == 2 and executed(mended)[0] == "train:0"


def test_what_a_stage_refuses_is_known_before_any_work(lab: Any, tmp_path: Path) -> None:
    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(tmp_path, grid={"prompts.0.question_column": ["question", "qestion"]})
    executor = lab.Inline()
    outcome = run_sweep(path, options(tmp_path), executor)
    assert outcome.done == 1 and outcome.failed_trials == (1,)
    assert executor.ran.count("prompts") == 1  # the other was refused by its preflight


def test_a_stage_that_was_asked_before_the_work_is_not_asked_again_by_its_own_process(
    lab: Any, tmp_path: Path, student_sweep: Callable[..., Path]
) -> None:
    path = student_sweep(grid={"student.phases.0.lr": [1e-4]})
    dies = lab.Scripted(lambda job, start: Ended(job.identity, "died", "", 137) if (job.label, start) == ("select", 1)
                        else None)  # fmt: skip
    run_sweep(path, options(tmp_path), dies)
    asked = {label: [job.checked for job in dies.jobs if job.label == label] for label in ("train:0", "select")}
    assert asked == {"train:0": [True], "select": [True, False]}  # what died may miss something
    plan = plan_sweep(path, replace(options(tmp_path), runs=tmp_path / "other"))
    node = next(node for node in plan.graph.nodes.values() if node.step.label == "train:0")
    job = job_of(node, node.recipe, plan.graph.options, Grant(1, 0.0), check_only=True)
    assert run_job(job).outcome == "failed" and run_job(replace(job, checked=True)).outcome == "done"


def test_a_stage_whose_process_dies_is_begun_again_and_fails_the_second_time(
    lab: Any, tmp_path: Path, student_sweep: Callable[..., Path]
) -> None:
    path = student_sweep(grid={"student.phases.0.lr": [1e-4]})

    def dies(times: int) -> Callable[[Job, int], Ended | None]:
        killed = "its process was killed by SIGKILL"
        return lambda job, start: (
            Ended(job.identity, "died", killed, 137) if job.label == "select" and start <= times else None
        )

    outcome = run_sweep(path, options(tmp_path), executor := lab.Scripted(dies(2)))
    assert outcome.failed_trials == (0,) and "SIGKILL" in outcome.errors[0]
    assert executor.order.count("select") == 2
    assert run_sweep(path, options(tmp_path), lab.Scripted(dies(1))).done == 1


def test_two_drivers_on_one_sweep_one_is_refused(lab: Any, tmp_path: Path, student_sweep: Callable[..., Path]) -> None:
    path = student_sweep(grid={"student.phases.0.lr": [1e-4]})
    folder = tmp_path / "runs" / "sweeps" / "sweep"
    folder.mkdir(parents=True)
    executor = lab.Scripted()
    with locked(folder, "held"), pytest.raises(LockedError, match=f"sweep sweep is being run by process {os.getpid()}"):
        run_sweep(path, options(tmp_path), executor)
    assert executor.jobs == []


def test_an_interrupted_sweep_asks_its_stages_to_save_themselves_and_goes_on_later(
    lab: Any, tmp_path: Path, student_sweep: Callable[..., Path]
) -> None:
    path = student_sweep(grid={"student.phases.0.lr": [1e-4, 2e-4]})

    def script(job: Job, _: int) -> None:
        if job.label == "train:0":
            signal.raise_signal(signal.SIGINT)

    executor = lab.Scripted(script, looks=3)
    with pytest.raises(Interrupted):
        run_sweep(path, options(tmp_path), executor)
    assert executor.stopped
    sealed = {path.parent.name for path in (tmp_path / "runs").glob("*/*/stage.json")}
    later = lab.Scripted()
    assert run_sweep(path, options(tmp_path), later).done == 2
    assert not sealed & {lab.step_of(job).folder.name for job in later.jobs}


def test_whoever_asks_twice_does_not_wait_for_stages_to_save_themselves(
    lab: Any, tmp_path: Path, student_sweep: Callable[..., Path]
) -> None:
    class Stubborn(lab.Scripted):  # type: ignore[misc, name-defined]
        closed: list[bool] = []

        def ended(self) -> list[Ended]:
            if self.order:
                signal.raise_signal(signal.SIGINT)  # again and again
            return []

        def close(self, at_once: bool = False) -> None:
            self.closed.append(at_once)
            self.order.clear()

    executor = Stubborn()
    with pytest.raises(Interrupted):
        run_sweep(student_sweep(), options(tmp_path), executor)
    assert executor.closed[0] is True


@pytest.mark.parametrize(("limits", "done"), [({"trials": 1}, 1), ({"hours": 1e-9}, 0)])
def test_a_limit_ends_a_sweep_and_a_higher_one_goes_on(
    lab: Any, tmp_path: Path, student_sweep: Callable[..., Path], limits: dict[str, float], done: int
) -> None:
    path = student_sweep(grid={"student.phases.0.lr": [1e-4, 2e-4]}, limits=limits)
    outcome = run_sweep(path, options(tmp_path), lab.Scripted(looks=1))
    assert outcome.done == done
    if outcome.summary.reason:
        with pytest.raises(BudgetError, match=r"limits.hours: 1e-09 hours have passed; 0 of 2 trials are done"):
            raise_for(outcome)
    else:
        assert outcome.left_out == 1
        record = read_record(path, tmp_path / "runs")
        assert [record.state_of(number) for number in record.numbers] == ["done", "left out"]
    path = student_sweep(grid={"student.phases.0.lr": [1e-4, 2e-4]})
    assert run_sweep(path, options(tmp_path), lab.Scripted(looks=1)).done == 2


def test_the_time_of_attempts_whose_driver_was_killed_counts(
    lab: Any, tmp_path: Path, student_sweep: Callable[..., Path]
) -> None:
    path = student_sweep(limits={"hours": 1.0})
    folder = tmp_path / "runs" / "sweeps" / "sweep"
    folder.mkdir(parents=True)
    killed = {"started": "2020-01-01T00:00:00.000001+00:00", "seconds": 1800.0}
    # what a driver leaves that was killed: the note it made each second
    (folder / "live.json").write_text(json.dumps({"schema": 1, "updated": "", "attempt": killed, "running": []}))
    hour = iter([0.0, *[1799.0] * 3, *[1801.0] * 1000])
    outcome = run_sweep(path, options(tmp_path), lab.Scripted(looks=9), clock=lambda: next(hour))
    assert outcome.summary.reason == "limits.hours: 1 hours have passed"
    attempts = [event for event in read_events(folder) if event.what == "attempt"]
    assert [event.outcome for event in attempts] == ["killed", ""] and attempts[0].seconds == 1800.0
    # killed between writing it down and letting go of the note: it counts once
    (folder / "live.json").write_text(json.dumps({"schema": 1, "updated": "", "attempt": killed, "running": []}))
    assert run_sweep(path, options(tmp_path), lab.Scripted()).done == 0
    assert [event.outcome for event in read_events(folder) if event.what == "attempt"] == ["killed", "", ""]


def test_dollars_are_handed_on_as_budgets_and_end_the_buying(
    lab: Any, tmp_path: Path, student_sweep: Callable[..., Path]
) -> None:
    prices = ", prices: {input_usd_per_mtok: 1, output_usd_per_mtok: 2}"
    recipe = STUDENT.replace("{engine: solver}", "{engine: openai, model: m" + prices + "}")
    with pytest.raises(RecipeError, match=r"limits.dollars takes prices.*'m' charges.*add teacher.prices"):
        plan_sweep(student_sweep(recipe.replace(prices, ""), limits={"dollars": 1}), options(tmp_path))
    path = student_sweep(recipe, grid={"teacher.sampling.seed": [0, 1, 2]}, limits={"dollars": 1.5})
    executor = lab.Scripted()
    outcome = run_sweep(path, options(tmp_path), executor)
    budgets = [json.loads(job.recipe)["teacher"]["budget"]["usd"] for job in executor.jobs if job.label == "generate"]
    assert budgets == [1.5, 0.5]  # one after the other; each seals with a dollar spent
    assert outcome.summary.reason == "limits.dollars: $1.5 are spent" and outcome.done < 3


# --- one stage ------------------------------------------------------------------------------------------------------


def test_a_stage_whose_inputs_changed_since_the_plan_is_refused(lab: Any, tmp_path: Path) -> None:
    lab.write_light_recipe(tmp_path)
    plan = plan_sweep(lab.write_sweep(tmp_path), options(tmp_path))
    node = next(iter(plan.graph.nodes.values()))
    job = job_of(node, node.recipe, options(tmp_path), Grant(1, 0.0))
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    other = run_job(replace(job, versions={**job.versions, "distill": "0.0.0"}))
    assert other.outcome == "failed" and "(the driver has 0.0.0); install the same everywhere" in other.error
    (tmp_path / "prompts.jsonl").write_text('{"question": "What is 1 + 1?", "answer": "2"}\n')
    ended = run_job(job)
    assert ended.outcome == "failed" and "its inputs are not what they were" in ended.error
    assert not (tmp_path / "runs" / "prompts").exists()


def test_a_torn_line_of_the_log_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"what":"attempt","at":"now","seconds":2.0}\n{"what":"sta')
    assert len(read_events(tmp_path)) == 1
    assert [event.seconds for event in Events(tmp_path).seen] == [2.0]
    assert (tmp_path / "events.jsonl").read_text().endswith("2.0}\n")


# --- processes ------------------------------------------------------------------------------------------------------


def test_stages_in_processes_of_their_own_give_what_this_process_gives(lab: Any, tmp_path: Path) -> None:
    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(tmp_path)
    run_sweep(path, replace(options(tmp_path), runs=tmp_path / "one"), lab.Inline())
    outcome = run_sweep(path, options(tmp_path), "local")
    assert outcome.done == 1

    def digests(runs: Path) -> dict[str, str]:
        documents = [json.loads(file.read_text()) for file in runs.glob("*/*/stage.json")]
        return {document["identity"]: document["digest"] for document in documents}

    assert digests(tmp_path / "one") == digests(tmp_path / "runs")
    threads = {event.label: event.cpus for event in read_events(outcome.folder) if event.what == "stage"}
    assert threads["select"] == 1


def test_a_process_that_is_killed_is_noticed_and_one_without_a_driver_ends_itself(lab: Any, tmp_path: Path) -> None:
    lab.write_light_recipe(tmp_path)
    plan = plan_sweep(lab.write_sweep(tmp_path), options(tmp_path))
    node = next(iter(plan.graph.nodes.values()))
    job = job_of(node, node.recipe, options(tmp_path), Grant(1, 0.0))
    executor = LocalExecutor(tmp_path)
    executor.start(job)
    executor.running[job.identity].process.kill()
    executor.running[job.identity].process.wait()
    (ended,) = executor.ended()
    assert ended.outcome == "died" and "SIGKILL" in ended.error
    with locked(_made(node.step.folder), "held by the test"):  # so that it waits
        executor.start(job)
        running = executor.running[job.identity].process
        assert running.stdin is not None
        time.sleep(0.1)
        running.stdin.close()  # as it is when the driver dies
        assert running.wait(30) == 128 + signal.SIGTERM
    executor.running.clear()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


DRIVER = """
import sys
from pathlib import Path
from distill.runs import RunOptions
from distill.sweep.run import run_sweep
run_sweep(sys.argv[1], RunOptions(Path(sys.argv[2]), "cpu", quiet=True))
"""


@pytest.mark.full
def test_a_driver_killed_at_twenty_random_moments_ends_as_one_that_was_not(lab: Any, tmp_path: Path) -> None:
    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(tmp_path, grid={"select.limit": list(range(1, 13)), "prompts.0.split_seed": [0, 1]})
    run_sweep(path, replace(options(tmp_path), runs=tmp_path / "whole"), lab.Inline())
    dice, kills = random.Random(0), 0
    while kills < 20:
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, path, tmp_path / "runs"], start_new_session=True)
        time.sleep(dice.uniform(0.2, 2.2))
        if driver.poll() is not None:
            break
        driver.kill()
        driver.wait()
        kills += 1
    outcome = run_sweep(path, options(tmp_path), "local")
    assert kills == 20 and outcome.done == 24

    def digests(runs: Path) -> dict[str, str]:
        documents = [json.loads(file.read_text()) for file in runs.glob("*/*/stage.json")]
        return {document["identity"]: document["digest"] for document in documents}

    assert digests(tmp_path / "runs") == digests(tmp_path / "whole")
    events = read_events(outcome.folder)
    finished = [event.identity for event in events if event.outcome == "done"]
    assert len(finished) == len(set(finished))
    assert "killed" in {event.outcome for event in events if event.what == "attempt"}


def test_the_view_and_the_status_tell_a_running_sweep(
    lab: Any, tmp_path: Path, student_sweep: Callable[..., Path], cli: Callable[..., Any]
) -> None:
    path = student_sweep(grid={"student.phases.0.lr": [1e-4, 2e-4]}, objectives=[{"metric": "stage_seconds"}])
    seen: list[Any] = []

    def view(_: Scheduler) -> None:
        if len(executor.order) >= 3 and not seen:
            seen.append(cli("sweep", "status", path, "--runs", tmp_path / "runs"))

    executor = lab.Scripted(looks=4)
    run_sweep(path, options(tmp_path), executor, view)
    assert "running" in seen[0].out and "no driver" not in seen[0].out
    assert "? to go" in seen[0].out  # nothing of the kind has finished yet
    said = cli("sweep", "status", "sweep", "--runs", tmp_path / "runs")
    assert re.search(
        r"2 trials \(2 done\), 10 of 10 distinct stages done, 0:0\d so far, \$1.00 spent; no driver", said.out
    )
    assert "lr=0.0001" in said.out and "stage_seconds" in said.out
    found = cli("sweep", "status", tmp_path / "runs" / "sweeps" / "sweep", "--json").json
    assert [trial["state"] for trial in found["trials"]] == ["done", "done"]
    wrong = cli("sweep", "status", "sweap", "--runs", tmp_path / "runs")
    assert wrong.code == 2 and "no sweep of that name" in wrong.error_line and "there are: sweep" in wrong.error_line


def test_what_is_to_go_is_known_as_far_as_such_stages_have_finished() -> None:
    times = {"train": 100.0, "export": 40.0, "prune": None}
    train, export, prune = Work("train", 2), Work("export", 1), Work("prune", 2)
    assert str(wall_time([train, export], times, 2)) == "2:00"  # (2 * 100 + 40) / 2
    assert str(wall_time([train._replace(spent_s=60.0)], times, 2)) == "0:40"
    late = train._replace(spent_s=600.0)
    assert str(wall_time([late], times, 2)) == "?" and str(wall_time([late, export], times, 2)) == ">0:20"
    assert wall_time([train, prune], times, 2) == (100.0, ("prune",))
    assert str(wall_time([train, prune], times, 2)) == ">1:40"
    assert str(wall_time([prune], times, 2)) == "?" and str(wall_time([], times, 2)) == "0:00"


def test_the_live_table_shows_every_trial(lab: Any, tmp_path: Path) -> None:
    from rich.console import Console

    from distill.sweep.view import Board, rich_table, shown

    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(tmp_path, grid={"select.limit": [5, 10]})
    folder = tmp_path / "runs" / "sweeps" / "sweep"
    with shown(folder, tmp_path / "runs", quiet=False, terminal=True) as view:
        run_sweep(path, options(tmp_path), lab.Inline(), view)
    board = Board(folder, tmp_path / "runs")
    console = Console(width=140, record=True)
    console.print(rich_table(board.record(), board, "as it is now", (140, 40)))
    text = console.export_text()
    assert "2 trials (2 done)" in text and "limit=5" in text and "%" in text
    narrow = Console(width=60, record=True)
    narrow.print(rich_table(board.record(), board, "as it is now", (60, 5)))
    text = narrow.export_text()
    assert "no room for accuracy:teacher, stage_seconds" in " ".join(text.split())
    assert "to go" in text and "cost" in text
    assert max(map(len, text.splitlines())) <= 60
