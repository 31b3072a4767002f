"""Tasks of lm-evaluation-harness on a student that is in memory, where that package is installed."""

import importlib.util
from typing import Any

from distill.config import Monitor
from distill.errors import MissingExtraError


def require_harness(monitor: Monitor | None) -> None:
    """Refuse a monitor with harness tasks where the harness is not installed."""
    if monitor and monitor.lm_eval and importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm_eval", "harness")


def harness_figures(model: Any, tokenizer: Any, monitor: Monitor) -> dict[str, Any]:
    """Every metric of the monitor's tasks as `lm_eval/TASK/METRIC`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=monitor.batch_size)
    found = lm_eval.simple_evaluate(
        model=judged, tasks=list(monitor.lm_eval), limit=monitor.lm_eval_limit, bootstrap_iters=0, verbosity="ERROR"
    )
    return flat_figures(found["results"])


def flat_figures(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The harness's results as figures by one name each."""
    return {
        f"lm_eval/{task}/{metric.partition(',')[0]}": value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric
    }
