"""Small real fakes for tests of sweeps: a recipe whose stages take no model, and executors that run in this process."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.artifact import VARIANT_FILES
from distill.config import recipe_from
from distill.evaluation import summarise
from distill.plan import make_plan
from distill.records import Item, Message, Prompt, Teacher, Trace, Usage, Verdict, digest_json, write_records
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

    name, cpus, blind = "inline", None, False

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

    def close(self, at_once: bool = False) -> None:
        self.waiting.clear()


def step_of(job: Job) -> Step:
    """The step that a job is to run."""
    return make_plan(recipe_from(json.loads(job.recipe)), RunOptions(Path(job.runs))).steps[job.label]


class Scripted:
    """An executor whose stages take some looks to end, as `script` says: what they really are is only sealed.

    `script` gets the job and how often it has been started; it returns an outcome, or None to let it run on.
    """

    name, cpus, blind = "scripted", None, False

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
                outcome = self._finish(job) if seen + 1 >= self.looks_of(job) else None
                self.running[identity] = (job, seen + 1)
            if outcome:
                del self.running[identity]
                found.append(outcome)
        return found

    def looks_of(self, job: Job) -> int:
        return self.looks

    def _finish(self, job: Job) -> Ended:
        with open_run(step_of(job), RunOptions(Path(job.runs))) as run:
            run.seal(digest="made", counts={"spent_usd": 1.0} if job.label == "generate" else {})
        return Ended(job.identity, "done")

    def stop(self, identity: str) -> None:
        self.stopped.append(identity)

    def close(self, at_once: bool = False) -> None:
        self.stopped += list(self.running)


# --- a sweep that looks as if models had been trained ---------------------------------------------------------------

PROBLEMS = 128
SIZES = {"fp32": 540_000, "int8": 157_000, "int4": 106_000}


class Painted(Scripted):
    """Seals stages with what such stages leave: items, summaries, metrics, weights, artifacts.

    The more examples the better, int4 a little worse than int8: the same problems are right each time.
    """

    def _finish(self, job: Job) -> Ended:
        recipe = json.loads(job.recipe)
        with open_run(step_of(job), RunOptions(Path(job.runs))) as run:
            counts = paint(run.folder, job.label, recipe)
            run.seal(digest="painted", counts=counts)
        return Ended(job.identity, "done")


def paint(folder: Path, label: str, recipe: dict[str, Any]) -> dict[str, Any]:
    stage, *rest = label.split(":")
    skill = 0.5 + recipe["select"]["limit"] / 2500 - (0.08 if recipe["student"]["prune"] else 0)
    if stage == "generate":
        return {"usd": 1.25, "spent_usd": 1.25, "output_tokens": 400_000, "answered": 900, "samples": 900}
    if stage == "eval":
        return paint_evaluation(folder, rest[0], {"base": 0.1, "student": skill}[rest[0]])
    if stage == "train":
        rows = [
            {"step": n, "loss": 0.2 + (1.4 - skill) / n**0.5, "lr": 1e-3, "grad_norm": 1.0, "tokens": 1000,
             "supervised": 700, "seconds": 0.5}
            for n in range(1, 61)
        ]  # fmt: skip
        _rows(folder / "metrics.jsonl", rows)
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_bytes(b"0" * 272_000)
        return {"steps": 60, "tokens": 60_000, "supervised_tokens": 42_000}
    if stage == "export":
        gates = []
        for variant in recipe["export"]["variants"]:
            made = folder / "artifact" / VARIANT_FILES[variant]
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_bytes(b"0" * (SIZES[variant] // (2 if recipe["student"]["prune"] else 1)))
            (folder / f"eval-{variant}").mkdir()
            loss = {"fp32": 0.0, "int8": 0.01, "int4": 0.03}[variant]
            paint_evaluation(folder / f"eval-{variant}", variant, skill - loss)
            gates.append({"name": "mean_kl", "variant": variant, "status": "passed", "value": 0.03, "limit": 0.1,
                          "unit": "nats/token", "detail": "over 2,077 positions"})  # fmt: skip
        (folder / "gates.json").write_text(json.dumps({"gates": gates}))
        return {"gates_passed": len(gates), "gates_failed": 0, "gates_not_run": 0}
    return {"rows": 400, "train": 300, "heldout": PROBLEMS, "examples": 200}


def _rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def paint_evaluation(folder: Path, model: str, skill: float) -> dict[str, Any]:
    """Items of a model that solves the problems up to its skill, some apart, and their summary."""
    items = [_item(model, number, _solves(model, number, skill)) for number in range(PROBLEMS)]
    write_records(folder / "items.jsonl", items)
    summary = summarise(items, [32, 64, 128])
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


def _solves(model: str, number: int, skill: float) -> bool:
    hardness = int(digest_json(["problem", number])[:6], 16) / 16**6
    luck = int(digest_json([model, skill, number])[:6], 16) / 16**6
    return hardness * 0.9 + luck * 0.1 < skill


def _item(model: str, number: int, right: bool) -> Item:
    prompt = Prompt.of([Message(role="user", content=f"What is {number} + {number}?")], gold=str(2 * number))
    answer = f"\\boxed{{{2 * number if right else 'no'}}}"
    trace = Trace(
        trace_id=f"{model}{number}", prompt_id=prompt.prompt_id, cfg=model, sample=0, reasoning="<b>Twice</b> it.",
        answer=answer, think="closed", finish_reason="stop", usage=Usage(input=5, output=40), latency_s=0.05,
        teacher=Teacher(engine="test"),
    )  # fmt: skip
    verdict = Verdict(trace_id=trace.trace_id, gold=prompt.gold, verifier="number@2",
                      outcome="correct" if right else "wrong")  # fmt: skip
    return Item(model=model, set="heldout", prompt=prompt, trace=trace, verdict=verdict)
