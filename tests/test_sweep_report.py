"""The report of a sweep and what ships from it: numbers by independent arithmetic, a page that holds what it shows."""

import csv
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distill.errors import GateError, RecipeError, RunError
from distill.runs import RunOptions
from distill.statistics import explained_share, mcnemar
from distill.sweep.config import Objective
from distill.sweep.measures import Measure
from distill.sweep.page import render
from distill.sweep.record import Record, read_record
from distill.sweep.report import sheet_of, write_report
from distill.sweep.results import Candidate, Results, front, read_results
from distill.sweep.run import run_sweep
from distill.sweep.ship import Condition, choose, ship

RECIPE = """
prompts:
  - {name: sums, reasoning_gym: {task: basic_arithmetic, size: 400, seed: 7}, heldout: 64}
teacher: {engine: solver}
select: {limit: 100}
student: {init: nobody/model, revision: "0000000000000000000000000000000000000000", phases: [{kind: sft}]}
evaluate: {models: [base, student]}
export: {variants: [int4]}
"""


@pytest.fixture(scope="module")
def painted(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A finished sweep of eight trials, one more that failed, and one that is left out."""
    folder = tmp_path_factory.mktemp("painted")
    (folder / "recipe.yaml").write_text(RECIPE)
    sweep = {
        "recipe": "recipe.yaml",
        "grid": {
            "select.limit": [100, 500, 1000],
            "student.prune": [None, {"layers": 20}],
            "export.variants": [["int8"], ["int4"]],
        },
        "when": [{"skip": {"select.limit": 500, "student.prune": {"not": None}}}],
        "objectives": [{"metric": "accuracy"}, {"metric": "bytes"}, {"metric": "dollars"}],
        "limits": {"trials": 9},
    }
    (folder / "sweep.yaml").write_text(json.dumps(sweep))

    def script(job: Any, _: int) -> Any:
        from distill.sweep.work import Ended

        limit = json.loads(job.recipe)["select"]["limit"]
        broken = job.label == "export" and limit == 500 and "int8" in job.recipe.split('"variants"')[1][:12]
        return Ended(job.identity, "failed", "gate mean_kl <b>failed</b>", 3) if broken else None

    run_sweep(folder / "sweep.yaml", RunOptions(folder / "runs", quiet=True), lab.Painted(script, looks=1))
    return read_record(folder / "sweep.yaml", folder / "runs")


@pytest.fixture(scope="module")
def results(painted: Record) -> Results:
    return read_results(painted)


# --- numbers --------------------------------------------------------------------------------------------------------


def test_mcnemar_is_the_binomial_tail_of_the_problems_that_one_alone_solves() -> None:
    first = [True] * 8 + [False] * 2 + [True] * 5
    second = [False] * 8 + [True] * 2 + [True] * 5
    tail = sum(math.comb(10, k) for k in (0, 1, 2)) / 2**10  # by hand: 56 / 1024
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(2 * tail) == pytest.approx(112 / 1024)
    assert mcnemar([True, False], [True, False]) == 1.0
    assert mcnemar([True] * 2000, [False] * 2000) < 1e-300
    with pytest.raises(ValueError, match="the same problems"):
        mcnemar([True], [])


def test_the_explained_share_is_between_over_total_variance() -> None:
    # by hand: means 2 and 6, grand mean 4, between = 2*4 + 2*4 = 16; total = 9 + 1 + 1 + 9 = 20
    assert explained_share([[1.0, 3.0], [5.0, 7.0]]) == pytest.approx(16 / 20)
    assert explained_share([[1.0, 1.0], [1.0]]) == 0.0


def candidate(name: str, **values: float) -> Candidate:
    return Candidate(name, (), values, None)


def test_a_front_holds_those_that_none_beats_in_both() -> None:
    found = [
        candidate("a", accuracy=0.9, bytes=100), candidate("b", accuracy=0.8, bytes=50),
        candidate("c", accuracy=0.7, bytes=60), candidate("d", accuracy=0.9, bytes=120), candidate("e", accuracy=0.1),
    ]  # fmt: skip
    assert [one.name for one in front(found, Objective(), Objective(metric="bytes"))] == ["b", "a"]


def test_the_best_is_compared_with_its_base_and_all_others(results: Results) -> None:
    assert len(results.candidates) == 8
    best = results.best
    assert best and best.values["accuracy"] == max(one.values["accuracy"] for one in results.candidates)
    base, *others = results.comparisons
    assert base.against == "base" and base.told_apart and base.difference.low > 0.5 and base.p and base.p < 1e-9
    assert {one.against for one in others} == {one.name for one in results.candidates[1:]}
    # by hand, from the items of both
    runner_up = results.candidates[1]
    mine, theirs = best.answers(), runner_up.answers()
    assert others[0].difference.value == pytest.approx(sum(mine.values()) / 128 - sum(theirs.values()) / 128)
    small = results.smallest_equal
    assert small and small.values["bytes"] <= best.values["bytes"]


def test_what_was_painted_to_matter_explains_most(results: Results) -> None:
    strongest = results.influences["accuracy"][0]
    assert strongest.key == "select.limit" and strongest.share > 0.7
    assert results.influences["bytes"][0].key in ("student.prune", "export.variants")
    assert results.influences["dollars"] == () or all(one.share == 0 for one in results.influences["dollars"])


def test_seeds_of_one_combination_are_one_candidate_with_means(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    sweep = {"recipe": "recipe.yaml", "seeds": [1, 2], "grid": {"select.limit": [100, 1000]}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    run_sweep(tmp_path / "sweep.yaml", RunOptions(tmp_path / "runs", quiet=True), lab.Painted(looks=1))
    found = read_results(read_record("sweep", tmp_path / "runs"))
    assert [one.name for one in found.candidates] == ["2,3", "0,1"]
    best = found.candidates[0]
    each = [trial.measures["accuracy"].value or 0.0 for trial in best.trials]
    assert best.values["accuracy"] == pytest.approx(sum(each) / 2)
    assert best.accuracy and best.accuracy.low < best.values["accuracy"] < best.accuracy.high


# --- files ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of a page; fails on tags that do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(html)
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag not in ("script", "img", "iframe", "link"), f"<{tag}> would load or run something"
        if identity := values.get("id"):
            assert identity not in self.ids, f"two elements are called {identity}"
            self.ids.add(identity)
        if (link := values.get("href")) is not None:
            assert link.startswith("#"), link
            self.links.add(link[1:])
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_holds_its_answer_and_all_sections_and_escapes_what_it_shows(
    painted: Record, results: Results
) -> None:
    html = render(sheet_of(painted, results))
    page, best = Page(html), results.best
    text = " ".join(" ".join(page.text).split())
    assert best and f"best: trial {best.name}" in text.replace("trial  ", "trial ")
    assert page.links <= page.ids
    assert {"ranking", "fronts", "significance", "coordinates", "importance", "curves", "trials"} <= page.ids
    assert {f"trial-{one.number}" for one in results.trials} <= page.ids
    assert "gate mean_kl <b>failed</b>" in text and "<b>failed</b>" not in html
    assert "distill sweep ship" in text and "student.prune=" in text and "flattering" in text
    assert "9 trials" not in text and "10 trials: 8 done, 1 failed, 1 left out" in text


def test_csv_and_json_beside_the_page_say_the_same(painted: Record, results: Results, tmp_path: Path) -> None:
    files = write_report(painted, tmp_path / "report.html")
    rows = list(csv.DictReader(files.csv.read_text().splitlines()))
    document = json.loads(files.json.read_text())
    assert [int(row["trial"]) for row in rows] == [one["number"] for one in document["trials"]] == painted.numbers
    for row, one in zip(rows, document["trials"]):
        assert row["state"] == one["state"]
        value = one["measures"]["accuracy"]["value"]
        assert row["accuracy"] == ("" if value is None else str(value))
    assert document["best"] == (results.best and results.best.name) and document["fronts"]["bytes"]
    assert json.loads(rows[-2]["student.prune"] or "null") == {"layers": 20}


def test_a_sweep_that_has_not_come_far_has_a_report_too(lab: Any, tmp_path: Path, cli: Callable[..., Any]) -> None:
    lab.write_light_recipe(tmp_path)
    path = lab.write_sweep(tmp_path, grid={"select.limit": [5, 10]}, limits={"hours": 1e-9})
    run_sweep(path, RunOptions(tmp_path / "runs", quiet=True), lab.Inline())
    said = cli("sweep", "report", path, "--runs", tmp_path / "runs")
    assert said.code == 0, said.err
    assert "No trial has come to its end yet." in " ".join(Page(Path(said.out.strip()).read_text()).text)


# --- shipping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "figure", "comparison", "limit"),
    [
        ("accuracy>=0.8", "accuracy", ">=", 0.8),
        ("bytes < 1e8", "bytes", "<", 1e8),
        ("accuracy:student:heldout==1", "accuracy:student:heldout", "=", 1.0),
    ],
)
def test_conditions_are_read(text: str, figure: str, comparison: str, limit: float) -> None:
    one = Condition.parse(text)
    assert (one.figure.title, one.comparison, one.limit) == (figure, comparison, limit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accuracy", "write FIGURE, one of >=, <=, >, <, =, and a number"),
        ("accuracy>=lots", "write FIGURE"),
        ("acuracy>1", "metric is 'acuracy'; choose .*did you mean 'accuracy'"),
    ],
)
def test_conditions_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Condition.parse(text)


def test_a_trial_without_the_figure_passes_no_condition() -> None:
    assert not Condition.parse("accuracy<2").holds(Measure(None))


def test_the_smallest_trial_that_is_good_enough_ships_with_its_lineage(
    painted: Record, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    choice = choose(painted, ["accuracy>=0.7"], least="bytes")
    values = {
        n: json.loads((painted.folder_of(painted.stages_of(n)[-1]) / "gates.json").read_text()) for n in choice.passed
    }
    assert choice.number == choice.passed[0] and len(values) == len(choice.passed) > 1
    sizes = [painted.trial(n).overrides for n in choice.passed]
    assert sizes[0]["student.prune"] == {"layers": 20} and sizes[0]["export.variants"] == ["int8"]
    said = cli(
        "sweep", "ship", "sweep", "--where", "accuracy>=0.7", "--min", "bytes", "--runs", painted.runs,
        "--out", tmp_path / "shipped",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert said.out.startswith(f"trial {choice.number}: least bytes of {len(choice.passed)} that pass, 8 finished")
    made = tmp_path / "shipped"
    assert (made / "artifact" / "onnx" / "model_quantized.onnx").stat().st_size == 78_500
    labels = {path.stem for path in (made / "lineage").iterdir()}
    assert {"prompts", "generate", "select", "prune", "train-0", "eval-student-heldout", "export"} <= labels
    assert json.loads((made / "choice.json").read_text())["conditions"] == ["accuracy>=0.7"]
    assert "`artifact/` is what ships" in (made / "README.md").read_text()
    assert json.loads((made / "recipe.json").read_text())["export"]["variants"] == ["int8"]
    again = cli("sweep", "ship", "sweep", "--trial", choice.number, "--runs", painted.runs, "--out", made)
    assert again.code == 2 and "exists already" in again.error_line
    inside = cli("sweep", "ship", "sweep", "--trial", choice.number, "--runs", painted.runs)
    assert Path(inside.out.splitlines()[-1]).parent == painted.runs / "shipped"
    now = read_record("sweep", painted.runs)
    assert now.state_of(choice.number) == "done", "what is shipped bears the export's identity and is no stage"


@pytest.mark.full
def test_what_ships_is_uploaded_as_it_lies_there(
    painted: Record, tmp_path: Path, command: Callable[..., Any], open_hub: Callable[..., Any]
) -> None:
    hub = open_hub("onnx/model_q4.onnx", "NOTICE")
    where = ["--runs", painted.runs, "--out", tmp_path / "shipped", "--push-to-hub", "ada/tiny", "--json"]
    done = command("sweep", "ship", "sweep", "--min", "bytes", *where, HF_ENDPOINT=hub.url, HF_TOKEN=hub.token)
    assert done.returncode == 0, done.stderr
    artifact = tmp_path / "shipped" / "artifact"
    made = {path.relative_to(artifact).as_posix(): path for path in artifact.rglob("*") if path.is_file()}
    assert {name: hub.files[name] for name in made} == {name: path.read_bytes() for name, path in made.items()}
    assert "NOTICE" in hub.files and any(name.startswith("onnx/") for name in made)
    assert hub.token not in done.stdout + done.stderr
    silent = command("sweep", "ship", "sweep", "--runs", painted.runs, "--push-to-hub", "ada/tiny")
    assert silent.returncode == 2 and "no token" in silent.stderr


def test_what_cannot_ship_is_said(painted: Record, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"none of 8 finished trials has accuracy>=0.99.*accuracy reaches 0\.\d+"):
        choose(painted, ["accuracy>=0.99"])
    failed = next(number for number in painted.numbers if painted.state_of(number) == "failed")
    with pytest.raises(RunError, match=f"trial {failed} of sweep is failed; only a finished one can ship"):
        choose(painted, trial=failed)
    with pytest.raises(RunError, match="has no trial 99"):
        choose(painted, trial=99)
    with pytest.raises(RecipeError, match="--min and --max"):
        choose(painted, least="bytes", most="accuracy")


def test_an_artifact_that_was_changed_after_it_was_sealed_does_not_ship(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "sweep.yaml").write_text(json.dumps({"recipe": "recipe.yaml"}))
    run_sweep(tmp_path / "sweep.yaml", RunOptions(tmp_path / "runs", quiet=True), lab.Painted(looks=1))
    record = read_record("sweep", tmp_path / "runs")
    model = next((tmp_path / "runs" / "export").glob("*/artifact/onnx/model_q4.onnx"))
    model.write_bytes(b"1" + model.read_bytes()[1:])
    with pytest.raises(RunError, match="holds other bytes"):
        ship(record, choose(record, most="accuracy"))
    assert not (tmp_path / "runs" / "shipped").exists() or not any((tmp_path / "runs" / "shipped").iterdir())
