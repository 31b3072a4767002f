"""The eval stage: verified accuracy of one model on one named set, item by item.

A model is anything behind an engine: the teacher, the base, the student, a quantized variant. Items are appended as
they are answered and verified, and batches are cut from the whole list, so a killed evaluation goes on with equal
text and asks for nothing twice. `evaluate` is the part that other stages call (the export's task gate); `run` is the
stage.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Collection, Coroutine, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from distill.config import Evaluate, FormatConfig, PromptSource, Recipe
from distill.engines import Completion, Engine, Request, load, open_engine, run_async, sample_seed, stream
from distill.errors import DataError
from distill.models import DTYPE_NAMES, find_model, load_config
from distill.plan import set_sources
from distill.progress import progress
from distill.records import Item, Prompt, RecordLog, Teacher, Trace, digest_json, read_records, write_json
from distill.runs import RunOptions, Step, open_run
from distill.statistics import Interval, accuracy, paired_difference, retained_share
from distill.verifiers import resolve
from distill.verifiers.pool import VerifierPool

ITEMS = "items.jsonl"
SUMMARY = "summary.json"


def preflight(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Refuse a base that is not there; teachers are checked by their own stage."""
    if step.args["model"] == "base":
        assert recipe.student is not None
        load_config(find_model(recipe.student.init, recipe.student.revision))


def run(recipe: Recipe, step: Step, options: RunOptions) -> None:
    """Evaluate model `step.args["model"]` on set `step.args["set"]` and seal the run."""
    assert recipe.evaluate is not None
    name, set_name = step.args["model"], step.args["set"]
    prompts = set_prompts(recipe.evaluate, set_name, step.result("prompts").path("heldout.jsonl"))
    with open_run(step, options) as run:
        engine = _engine(recipe, step, options)
        sources = set_sources(recipe, set_name)
        summary = evaluate(engine, prompts, recipe.evaluate, name, set_name, run.folder, options, sources)
        items = sorted(read_items(run.folder), key=lambda item: (item.prompt.prompt_id, item.trace.sample))
        digest = digest_json([item.result for item in items])
        run.seal(digest=digest, counts=summary)


def set_prompts(evaluate: Evaluate, name: str, path: Path) -> list[Prompt]:
    """The problems of a named set, cut to its limit."""
    prompts = list(islice(read_records(path, Prompt), evaluate.sets[name].limit))
    if not prompts:
        raise DataError(f"evaluation set {name!r} has no problems ({path})")
    return prompts


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    config: Evaluate,
    model: str,
    set_name: str,
    folder: Path,
    options: RunOptions,
    sources: Sequence[PromptSource] = (),
) -> dict[str, Any]:
    """Answer, verify and keep every item in `folder`; returns the summary it writes there and closes the engine.

    Resumes from the items that are there; raises nothing for wrong or failed answers, which are items too. Prompts of
    `sources` are judged by the verifiers that these name now, all others by the one in their own record.
    """
    requests = [_request(prompt, sample, config) for prompt in prompts for sample in range(config.sampling.n)]
    verifiers = {source.name: resolve(source.verifier) for source in sources}
    # judges are asked like teachers, with a ledger: their home is there
    open_judges = load("distill.teachers.judging:open_judges")
    with RecordLog(folder / ITEMS) as log, open_judges(verifiers.values(), FormatConfig(), options) as judges:
        with VerifierPool(options.cpu_threads, by_source=verifiers, judging=judges.verdict) as pool:
            work = _answer_all(engine, requests, model, set_name, log, pool, folder, options)
            run_async(_then_close(work, judges))
    summary = summarise(list(read_items(folder)), config.token_budgets)
    write_json(folder / SUMMARY, summary)
    return summary


async def _then_close(work: Coroutine[Any, Any, None], judges: Any) -> None:
    try:
        await work
    finally:
        await judges.close()


async def _answer_all(
    engine: Engine,
    requests: Sequence[Request],
    model: str,
    set_name: str,
    log: RecordLog,
    verifiers: VerifierPool,
    folder: Path,
    options: RunOptions,
) -> None:
    """Append an item for every request that has none yet, as soon as it is verified."""
    done = {(item.prompt.prompt_id, item.trace.sample) for item in read_items(folder)}
    try:
        with progress(f"eval {model} on {set_name}", len(requests), options, unit="answers", done=len(done)) as bar:
            async for answered in _answers(engine, requests, done):
                pairs = [(request.prompt, _trace(request, answer, engine, model)) for request, answer in answered]
                verdicts = await asyncio.gather(*(verifiers.verify(prompt, trace) for prompt, trace in pairs))
                log.append(
                    *(
                        Item(model=model, set=set_name, prompt=prompt, trace=trace, verdict=verdict)
                        for (prompt, trace), verdict in zip(pairs, verdicts)
                    )
                )
                bar.advance(len(pairs), tokens=sum(trace.usage.output for _, trace in pairs))
    finally:
        await engine.close()


async def _answers(
    engine: Engine, requests: Sequence[Request], done: Collection[tuple[str, int]]
) -> AsyncIterator[list[tuple[Request, Completion]]]:
    """Answers to the requests that are not done: one by one as they come, or by the batch where the engine has them."""
    if engine.batch_size is None:
        owed = {request.key: request for request in requests if request.key not in done}
        async for answer in engine.generate(stream(owed.values())):
            yield [(owed[answer.key], answer)]
        return
    for batch in _batches(requests, engine.batch_size):
        owed = {request.key: request for request in batch if request.key not in done}
        if owed:
            # the text depends on the whole batch, so the whole batch is generated again
            answers = {answer.key: answer async for answer in engine.generate(stream(batch))}
            yield [(request, answers[key]) for key, request in owed.items()]


def _batches(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    """Batches of prompts of like length, cut from the whole list in a fixed order."""
    order = sorted(requests, key=lambda r: (sum(len(m.content) for m in r.prompt.messages), r.key))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _request(prompt: Prompt, sample: int, config: Evaluate) -> Request:
    return Request(prompt, sample, config.sampling, sample_seed(config.sampling.seed, prompt.prompt_id, sample))


def _trace(request: Request, answer: Completion, engine: Engine, model: str) -> Trace:
    """The trace of an evaluated sample; its cfg is the model's name, since no ledger holds it."""
    prompt_id, sample = request.key
    return Trace(
        trace_id=digest_json([model, prompt_id, sample, answer.raw])[:16],
        prompt_id=prompt_id,
        cfg=model,
        sample=sample,
        reasoning=answer.reasoning,
        answer=answer.answer,
        raw=answer.raw,
        think=answer.think,
        finish_reason=answer.finish_reason,
        usage=answer.usage,
        latency_s=answer.latency_s,
        teacher=Teacher(engine=engine.name, engine_version=engine.version, model=answer.model or model),
        token_ids=answer.token_ids,
        error=answer.error,
    )


def read_items(folder: Path) -> Iterator[Item]:
    """The items of an evaluation."""
    path = folder / ITEMS
    yield from read_records(path, Item) if path.exists() else ()


# --- summaries ------------------------------------------------------------------------------------------------------


def summarise(items: Sequence[Item], budgets: Sequence[int]) -> dict[str, Any]:
    """Accuracy with its interval, stop and truncation rates, mean tokens, accuracy against token budget.

    Failed requests make a model `available: false` when there is nothing else (recorded traces that do not cover the
    set); otherwise they count as wrong.
    """
    answered = [item for item in items if not item.trace.failed]
    if not answered:
        reason = items[0].trace.error if items else "no items"
        return {"available": False, "reason": reason, "problems": len({i.prompt.prompt_id for i in items})}
    grouped = by_problem(items)
    tokens = [item.tokens for item in answered]
    interval = accuracy(list(grouped.values()))
    return {
        "available": True,
        "problems": len(grouped),
        "samples": len(items),
        "failed": len(items) - len(answered),
        "accuracy": interval.value,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "outcomes": _counts(item.verdict.outcome for item in items),
        "think": _counts(item.trace.think for item in answered),
        "stop_rate": _share(item.trace.finish_reason == "stop" for item in answered),
        "truncation_rate": _share(item.trace.finish_reason == "length" for item in answered),
        "mean_tokens": sum(tokens) / len(tokens),
        "tokens": sum(tokens),
        "seconds": sum(item.trace.latency_s for item in answered),
        "tokens_per_s": sum(tokens) / max(1e-9, sum(item.trace.latency_s for item in answered)),
        "accuracy_within_tokens": {
            str(budget): _share(item.verdict.correct and item.tokens <= budget for item in items) for budget in budgets
        },
    }


def by_problem(items: Sequence[Item]) -> dict[str, list[bool]]:
    """Whether each sample was right, grouped by problem in the order of the set."""
    grouped: dict[str, list[bool]] = {}
    for item in sorted(items, key=lambda item: (item.prompt.prompt_id, item.trace.sample)):
        grouped.setdefault(item.prompt.prompt_id, []).append(item.verdict.correct)
    return grouped


def difference(first: Sequence[Item], second: Sequence[Item]) -> Interval:
    """Accuracy of `first` minus that of `second`, paired by problem.

    Raises DataError if they were not evaluated on the same problems.
    """
    one, other = _by_same_problems(first, second)
    return paired_difference(one, other)


def retained(base: Sequence[Item], student: Sequence[Item], variant: Sequence[Item]) -> Interval:
    """Share of the student's gain over its base that a variant keeps, paired by problem; raises as `difference`."""
    before, after, later = _by_same_problems(base, student, variant)
    return retained_share(before, after, later)


def _by_same_problems(*evaluations: Sequence[Item]) -> list[list[float]]:
    """Accuracy of each problem, in one order for all evaluations."""
    groups = [by_problem(items) for items in evaluations]
    if any(group.keys() != groups[0].keys() for group in groups):
        raise DataError("these evaluations cover different problems; evaluate both on the same set")
    return [[sum(group[key]) / len(group[key]) for key in groups[0]] for group in groups]


def _counts(values: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return dict(sorted(found.items()))


def _share(values: Any) -> float:
    flags = [bool(value) for value in values]
    return sum(flags) / max(1, len(flags))


# --- engines by model -----------------------------------------------------------------------------------------------


def _engine(recipe: Recipe, step: Step, options: RunOptions) -> Engine:
    """The engine of the model that a step evaluates."""
    model = step.args["model"]
    if model == "teacher":
        assert recipe.teacher is not None
        return open_engine(recipe.teacher, recipe.format, options)
    if "artifact" in step.upstream:
        return onnx_engine(recipe, step.result("artifact").path("artifact"), str(step.args["variant"]), options)
    return local_engine(recipe, step, options)


def local_engine(recipe: Recipe, step: Step, options: RunOptions) -> Engine:
    """The base or the student in transformers, with the recipe's format and precision."""
    from distill.engines.transformers import TransformersEngine

    assert recipe.student is not None and recipe.evaluate is not None
    dtype = DTYPE_NAMES[recipe.student.precision]
    if "model" in step.upstream:
        name, revision = str(step.result("model").path("model")), "main"
    else:
        name, revision = recipe.student.init, recipe.student.revision
    return TransformersEngine.load(name, revision, recipe.format, recipe.evaluate.batch_size, dtype, options)


def onnx_engine(recipe: Recipe, folder: Path, variant: str, options: RunOptions) -> Engine:
    """A variant of an artifact in onnxruntime."""
    from distill.engines.onnx import OnnxEngine

    assert recipe.evaluate is not None
    return OnnxEngine(folder, recipe.format, recipe.evaluate.batch_size, options, variant)


def load_summary(folder: Path) -> Mapping[str, Any]:
    """The summary an evaluation wrote."""
    return dict(json.loads((folder / SUMMARY).read_text(encoding="utf-8")))
