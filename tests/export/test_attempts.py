"""The first scheme that passes its gates ships, others before it are kept, and a kill costs no finished attempt."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from distill.artifact import VARIANT_FILES, data_file, variants_in
from distill.config import ExportConfig
from distill.export.attempts import Climbing, climb, read_tried
from distill.export.manifest import GateEntry
from distill.export.measure import Measured
from distill.export.quantize import Rounded
from distill.export.schemes import Scheme
from distill.models import find_model, load_config
from distill.runs import OpenRun, RunOptions, Step


class Judge:
    """Passes attempts from the `passing`-th on, and counts what it was asked."""

    def __init__(self, passing: int, hopeless: bool = False) -> None:
        self.passing, self.hopeless, self.judged, self.rounded, self.evaluated = passing, hopeless, 0, 0, 0

    def parity(self, variant: str, folder: Path, give_up: bool) -> Measured:
        assert variants_in(folder) == [variant]
        self.judged += 1
        status = "passed" if self.judged >= self.passing else "failed"
        gate = GateEntry(name="mean_kl", variant=variant, status=status, value=0.1, limit=0.05)  # type: ignore[arg-type]
        return Measured([gate], hopeless=self.hopeless and give_up and status == "failed")

    def task(self, variant: str, folder: Path, items: Path) -> list[GateEntry]:
        self.evaluated += 1
        (items / "items.jsonl").write_text(f"{self.judged}\n")
        return [GateEntry(name="accuracy_drop", variant=variant, status="not_run")]

    def round_weights(self, scheme: Scheme) -> Iterator[Mapping[str, Rounded]]:
        self.rounded += 1
        return iter(())

    @property
    def climbing(self) -> Climbing:
        return Climbing(self.round_weights, self.parity, self.task)


@pytest.fixture
def run(tmp_path: Path) -> OpenRun:
    return OpenRun(Step("export", "export", "r", "0" * 16, {}, {}, tmp_path), RunOptions(runs=tmp_path, quiet=True))


@pytest.fixture
def go(student: Callable[..., Path], run: OpenRun) -> Callable[..., None]:
    def start(judge: Judge, variant: str = "int4", **options: Any) -> None:
        config = load_config(find_model(str(student())))
        export = ExportConfig(variants=[variant], **options)  # type: ignore[list-item]
        climb(student(), config, variant, export, run, judge.climbing)

    return start


def schemes(run: OpenRun) -> list[tuple[str, bool]]:
    return [(tried.scheme, tried.chosen) for tried in read_tried(run, "int4")]


def test_a_scheme_that_misses_a_gate_gives_way_to_the_next(run: OpenRun, go: Callable[..., None]) -> None:
    judge = Judge(passing=3)
    go(judge)
    assert schemes(run) == [
        ("int4 k-quant", False), ("int4 k-quant, int8 head", False), ("int4 gptq, int8 head", True)
    ]  # fmt: skip
    assert judge.rounded == 1
    sizes = [tried.bytes for tried in read_tried(run, "int4")]
    assert sizes[0] < sizes[1] == sizes[2] == sum(p.stat().st_size for p in run.path("artifact/onnx").iterdir())
    assert read_tried(run, "int4")[0].missed == "mean_kl"
    assert run.path("eval-int4/items.jsonl").read_text() == "3\n"
    assert json.loads(run.path("parity-int4.json").read_text())["gates"][0]["status"] == "passed"
    assert run.path("build-int4.json").exists()


def test_the_first_scheme_ships_where_it_passes_or_no_other_may_follow(run: OpenRun, go: Callable[..., None]) -> None:
    go(Judge(passing=9), ladder=False)
    assert schemes(run) == [("int4 k-quant", True)] and read_tried(run, "int4")[0].missed == "mean_kl"


def test_where_none_passes_the_last_one_is_kept_and_its_gates_say_so(run: OpenRun, go: Callable[..., None]) -> None:
    go(Judge(passing=9))
    tried = read_tried(run, "int4")
    assert [one.chosen for one in tried] == [False] * 5 + [True] and tried[-1].scheme == "int8 rtn, fp32 activations"
    assert tried[-1].missed == "mean_kl"


def test_a_scheme_that_is_far_off_costs_no_evaluation_unless_it_is_the_last(
    run: OpenRun, go: Callable[..., None]
) -> None:
    judge = Judge(passing=2, hopeless=True)
    go(judge)
    # no better head saves a body that is far off: the next one is rounded by another method
    assert schemes(run) == [("int4 k-quant", False), ("int4 gptq, int8 head", True)]
    assert judge.judged == 2 and judge.evaluated == 1


def test_the_last_scheme_is_measured_whole_however_far_off_it_is(run: OpenRun, go: Callable[..., None]) -> None:
    judge = Judge(passing=9, hopeless=True)
    go(judge, ladder=False)
    assert judge.evaluated == 1 and len(read_tried(run, "int4")[0].gates) == 2


class KilledError(Exception):
    """Stands for a kill between two steps."""


def test_a_kill_costs_no_finished_attempt(run: OpenRun, go: Callable[..., None]) -> None:
    judge = Judge(passing=2)
    whole = judge.climbing

    def die(variant: str, folder: Path, give_up: bool) -> Measured:
        if judge.judged == 1:
            raise KilledError
        return whole.parity(variant, folder, give_up)

    class Dying(Judge):
        climbing = whole._replace(parity=die)  # type: ignore[assignment]

    with pytest.raises(KilledError):
        go(Dying(passing=2))
    built = run.work / "int4-1" / "artifact" / VARIANT_FILES["int4"]
    before = built.stat().st_mtime_ns
    go(judge)
    assert judge.judged == 2 and schemes(run) == [("int4 k-quant", False), ("int4 k-quant, int8 head", True)]
    assert run.path("artifact").joinpath(VARIANT_FILES["int4"]).stat().st_mtime_ns == before
    go(judge)  # all is done: nothing is asked again
    assert judge.judged == 2


def test_an_adoption_cut_short_is_finished(run: OpenRun, go: Callable[..., None]) -> None:
    judge = Judge(passing=1)
    go(judge)
    run.path("attempts-int4.json").unlink()  # as if killed before it was written, with half of the files moved
    (run.work / "int4-0" / "artifact" / "onnx").mkdir(exist_ok=True)
    data = data_file(run.path("artifact") / VARIANT_FILES["int4"])
    data.rename(run.work / "int4-0" / "artifact" / "onnx" / data.name)
    run.path("eval-int4").rename(run.work / "int4-0" / "eval")
    go(judge)
    assert data.exists() and run.path("eval-int4/items.jsonl").exists()
    assert schemes(run) == [("int4 k-quant", True)] and judge.judged == 1
