"""Small real fakes for tests of sweeps: a recipe whose stages take no model, and executors that run in this process."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.config import recipe_from
from distill.plan import make_plan
from distill.runs import RunOptions, Step, open_run
from distill.sweep.work import Ended, Job, run_job


def write_light_recipe(folder: Path, problems: int = 60) -> Path:
    """Prompts and recorded traces of which every fifth is wrong, and an evaluation of the teacher: no model at all."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [(f"What is {a} + {b}?", a + b) for a in range(3, 3 + problems // 10) for b in range(11, 21)]
    answers = [total + (index % 5 == 0) for index, (_, total) in enumerate(made)]
    texts = [f"<think>\nI add.\n</think>\n\n\\boxed{{{answer}}}" for answer in answers]
    _lines(folder / "prompts.jsonl", [{"question": q, "answer": str(total)} for q, total in made])
    _lines(folder / "traces.jsonl", [{"question": q, "response": text} for (q, _), text in zip(made, texts)])
    recipe = {
        "prompts": [{"name": "sums", "file": "prompts.jsonl", "heldout": 20}],
        "teacher": {"engine": "recorded", "recorded": {"files": ["traces.jsonl"]}},
        "evaluate": {"models": ["teacher"]},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1))
    return path


def _lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_sweep(folder: Path, **sections: Any) -> Path:
    """A sweep file beside the recipe; by default it wants the recorded teacher's accuracy."""
    path = folder / "sweep.yaml"
    wanted = {"objectives": [{"metric": "accuracy", "model": "teacher"}, {"metric": "stage_seconds"}]}
    path.write_text(json.dumps({"recipe": "recipe.yaml", **wanted, **sections}, indent=1))
    return path


class Inline:
    """An executor that runs each stage's real code in this process, when it is asked what has ended."""

    name, cpus = "inline", None

    def __init__(self) -> None:
        self.waiting: list[Job] = []
        self.ran: list[str] = []

    def check(self, jobs: list[Job]) -> dict[str, str]:
        return {one.identity: one.error for one in map(run_job, jobs) if one.error}

    def wait(self, seconds: float) -> None:
        pass

    def start(self, job: Job) -> None:
        self.waiting.append(job)

    def ended(self) -> list[Ended]:
        jobs, self.waiting = self.waiting, []
        self.ran += [job.label for job in jobs]
        return [run_job(job) for job in jobs]

    def stop(self, identity: str) -> None:
        pass

    def close(self) -> None:
        self.waiting.clear()


def step_of(job: Job) -> Step:
    """The step that a job is to run."""
    return make_plan(recipe_from(json.loads(job.recipe)), RunOptions(Path(job.runs))).steps[job.label]


class Scripted:
    """An executor whose stages take some looks to end, as `script` says: what they really are is only sealed.

    `script` gets the job and how often it has been started; it returns an outcome, or None to let it run on.
    """

    name, cpus = "scripted", None

    def __init__(self, script: Callable[[Job, int], Ended | None] | None = None, looks: int = 2) -> None:
        self.script, self.looks = script, looks
        self.running: dict[str, tuple[Job, int]] = {}
        self.started: Counter[str] = Counter()
        self.order: list[str] = []
        self.jobs: list[Job] = []
        self.most_cpus = self.most_at_once = 0
        self.stopped: list[str] = []

    def check(self, jobs: list[Job]) -> dict[str, str]:
        return {}

    def wait(self, seconds: float) -> None:
        pass

    def start(self, job: Job) -> None:
        self.running[job.identity] = (job, 0)
        self.started[job.identity] += 1
        self.order.append(job.label)
        self.jobs.append(job)
        self.most_at_once = max(self.most_at_once, len(self.running))
        self.most_cpus = max(self.most_cpus, sum(job.threads for job, _ in self.running.values()))

    def ended(self) -> list[Ended]:
        found = []
        for identity, (job, seen) in list(self.running.items()):
            if identity in self.stopped:
                outcome: Ended | None = Ended(identity, "stopped", "", 143)
            elif self.script and (said := self.script(job, self.started[identity])):
                outcome = said
            else:
                outcome = self._finish(job) if seen + 1 >= self.looks else None
                self.running[identity] = (job, seen + 1)
            if outcome:
                del self.running[identity]
                found.append(outcome)
        return found

    def _finish(self, job: Job) -> Ended:
        with open_run(step_of(job), RunOptions(Path(job.runs))) as run:
            run.seal(digest="made", counts={"spent_usd": 1.0} if job.label == "generate" else {})
        return Ended(job.identity, "done")

    def stop(self, identity: str) -> None:
        self.stopped.append(identity)

    def close(self) -> None:
        self.stopped += list(self.running)
