"""Progress: true figures, silent when asked, plain where there is no terminal, and never on stdout."""

import pytest

from distill.progress import Bar, clock_text, progress
from distill.runs import RunOptions


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_eta_are_those_of_this_attempt() -> None:
    clock = Clock()
    bar = Bar("train", total=100, unit="steps", done=40, clock=clock)
    assert (bar.rate, bar.eta_s) == (0, None)
    clock.now += 10
    bar.advance(20, tokens=5000, loss="1.23")
    assert (bar.done, bar.rate, bar.eta_s) == (60, 2.0, 20.0)
    assert bar.line() == "train: 60/100 (60%) steps, 2 steps/s, 500 tokens/s, ETA 0:20, loss 1.23"


def test_a_later_value_replaces_the_shown_one() -> None:
    bar = Bar("train", total=None, clock=Clock())
    bar.advance(loss="2", lr="1e-5")
    bar.advance(loss="1")
    assert bar.shown == {"loss": "1", "lr": "1e-5"}
    assert bar.line() == "train: 2, 0/s, loss 1, lr 1e-5"


def test_clock_text() -> None:
    assert [clock_text(seconds) for seconds in (0, 59.6, 65, 7384)] == ["0:00", "1:00", "1:05", "2:03:04"]


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_prints_nothing(terminal: bool, capfd: pytest.CaptureFixture[str]) -> None:
    with progress("train", 3, RunOptions(quiet=True), terminal=terminal) as bar:
        bar.advance(3)
    assert bar.done == 3
    assert capfd.readouterr() == ("", "")


def test_a_terminal_shows_a_bar_on_stderr_only(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("train", 3, RunOptions(), unit="steps", terminal=True) as bar:
        print("a result")
        bar.advance(3, loss="1.23")
    said = capfd.readouterr()
    assert said.out == "a result\n"
    assert "train" in said.err and "3/3" in said.err


def test_short_work_prints_no_plain_lines(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("train", 3, RunOptions(), terminal=False) as bar:
        bar.advance(3)
    assert capfd.readouterr() == ("", "")


def test_long_work_prints_a_plain_line_now_and_then_and_one_at_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("train", 8, RunOptions(), unit="steps", terminal=False, every_s=0.0, worth_s=0.0) as bar:
        bar.advance(4)
        bar.advance(4)
    said = capfd.readouterr()
    assert said.out == ""
    assert [line.partition(",")[0] for line in said.err.splitlines()] == [
        "train: 4/8 (50%) steps",
        "train: 8/8 (100%) steps",
        "train: 8/8 (100%) steps",
    ]
