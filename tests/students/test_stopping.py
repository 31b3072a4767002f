"""The rule of early stopping as a table, and what a resume must know of it."""

import math
from typing import Any

import pytest

from distill.config import EarlyStopping
from distill.errors import TrainingError
from distill.students.stopping import Stopping

NAN = math.nan

TABLE = [
    # rule, figures look by look, looks that are the best so far, the look after which it stops
    ({"patience": 2}, [3.0, 2.0, 1.0, 0.5], [0, 1, 2, 3], None),
    ({"patience": 2}, [3.0, 2.0, 2.5, 2.1], [0, 1], 3),
    ({"patience": 2}, [3.0, 3.5, 2.0, 2.5, 1.9, 2.0], [0, 2, 4], None),
    ({"patience": 1}, [3.0, 3.0], [0], 1),  # as good is no improvement
    ({"patience": 3}, [1.0, 1.1, 1.2, 1.3], [0], 3),
    ({"patience": 3}, [1.0, 1.1, 1.2], [0], None),
    ({"patience": 2, "min_delta": 0.25}, [3.0, 2.75, 2.5, 2.0], [0, 2, 3], None),  # 3.0 - 2.75 is not above 0.25
    ({"patience": 2, "min_delta": 0.25}, [3.0, 2.875, 2.75], [0], 2),  # small gains do not add up to the best
    ({"patience": 2, "metric": "accuracy"}, [0.1, 0.2, 0.2, 0.5], [0, 1, 3], None),
    ({"patience": 2, "metric": "accuracy"}, [0.5, 0.4, 0.3], [0], 2),
    ({"patience": 2, "metric": "accuracy", "min_delta": 0.125}, [0.0, 0.125, 0.25, 0.375], [0, 2], None),
    ({"patience": 2}, [3.0, NAN, NAN], [0], 2),  # what is no number is no improvement
    ({"patience": 2}, [NAN, 3.0, 2.0, 2.5], [1, 2], None),  # and never the best
]


@pytest.mark.parametrize(("rule", "figures", "best", "last"), TABLE)
def test_when_it_stops_and_which_looks_are_best(
    rule: dict[str, Any], figures: list[float], best: list[int], last: int | None
) -> None:
    chosen = EarlyStopping(**rule)
    stopping = Stopping(chosen)
    improved = []
    for look, value in enumerate(figures):
        assert not stopping.stopped, f"before look {look}"
        if stopping.take({chosen.metric: value, "other": 9.0}, 10 * look):
            improved.append(look)
            assert stopping.best == value and stopping.best_step == 10 * look
    assert improved == best and stopping.best_step == 10 * best[-1]
    assert stopping.stopped is (last is not None)
    assert last is None or last == len(figures) - 1


def test_without_a_rule_it_never_stops_and_knows_no_best() -> None:
    stopping = Stopping(None)
    assert not any(stopping.take({"heldout_loss": value}, 1) for value in (3.0, 2.0, 9.0))
    assert not stopping.stopped and stopping.best_step is None


def test_a_figure_that_was_not_measured_is_said() -> None:
    stopping = Stopping(EarlyStopping(metric="accuracy"))
    with pytest.raises(TrainingError, match=r"early_stopping\.metric accuracy was not measured at step 4"):
        stopping.take({"heldout_loss": 1.0}, 4)


@pytest.mark.parametrize("kept", range(6))
def test_it_goes_on_from_what_a_checkpoint_kept(kept: int) -> None:
    figures = [3.0, 2.0, 2.5, 1.5, 1.6, 1.7]
    rule = EarlyStopping(patience=2)
    whole, before, after = Stopping(rule), Stopping(rule), Stopping(rule)
    expected = [whole.take({"heldout_loss": value}, step) for step, value in enumerate(figures)]
    found = [before.take({"heldout_loss": value}, step) for step, value in enumerate(figures[:kept])]
    after.load(before.state())
    found += [after.take({"heldout_loss": value}, step) for step, value in enumerate(figures[kept:], kept)]
    assert found == expected and after.state() == whole.state() and after.stopped and whole.stopped
