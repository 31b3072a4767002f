"""The data set that selection leaves: it loads as other tools expect, says what it is, and is the same every time."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.cards import fenced, markdown_table
from distill.config import FormatConfig, Recipe, recipe_from
from distill.plan import make_plan
from distill.records import Example, Message, Prompt, Teacher, Trace, Usage, Verdict, digest_json, write_records
from distill.runs import RunOptions, SealedRun, Step, file_digest, open_run
from distill.teachers import select
from distill.teachers.card import published_recipe, size_category
from distill.teachers.training_set import MISSING, TrainingSet
from distill.verifiers import resolve

pytest.importorskip("pyarrow")

R1 = Teacher(engine="openai", engine_version="2", model="deepseek-reasoner", licence="MIT")


def prompt(number: int, source: str = "sums", licence: str | None = "Apache-2.0") -> Prompt:
    asked = [Message(role="user", content=f"{number} + 1?")]
    return Prompt.of(asked, gold=str(number + 1), source=source, licence=licence)


def trace(number: int, **fields: Any) -> Trace:
    given = {
        "reasoning": f"{number} and one", "think": "closed", "finish_reason": "stop", "teacher": R1,
        "answer": f"\\boxed{{{number + 1}}}", "usage": Usage(input=5, output=7, reasoning=3),
    }  # fmt: skip
    return Trace(trace_id=f"t{number}", prompt_id=prompt(number).prompt_id, cfg="c", sample=0, **given | fields)


def recipe_of(**sections: Any) -> Recipe:
    source = {"name": "sums", "file": "/home/ada/sums.jsonl", "licence": "Apache-2.0", "heldout": 2}
    teacher = {
        "engine": "openai", "model": "deepseek-reasoner", "licence": "MIT", "sampling": {"temperature": 0.6},
        "endpoint": {"base_url": "http://inside.example/v1"}, "prices": dict.fromkeys(
            ["input_usd_per_mtok", "output_usd_per_mtok"], 1.0
        ),
    }  # fmt: skip
    return recipe_from({"name": "r", "prompts": [source], "teacher": teacher, **sections})


def selected(
    lab: Any, traces: Sequence[Trace], heldout: Sequence[Prompt] = (), recipe: Recipe | None = None,
    train: Sequence[Prompt] | None = None,
) -> SealedRun:  # fmt: skip
    """A select run over traces of 0..9."""
    prompts = lab.prompts([prompt(number) for number in range(10)] if train is None else train, heldout)
    roots: Mapping[str, Any] = {"roots": {"openai": "https"}}
    generate = Step("generate", "generate", "r", "f" * 16, roots, {"prompts": prompts}, lab.runs)
    with open_run(generate, lab.options) as run:
        write_records(run.path("traces.jsonl"), traces)
        write_records(run.path("failed.jsonl"), [])
        run.seal("d", {"answered": len(traces)})
    recipe = recipe or recipe_of()
    fields = {"verifiers": ["number@1"]}
    upstream = {"traces": generate, "prompts": prompts}
    step = Step("select", "select", "r", digest_json(recipe.name)[:16], fields, upstream, lab.runs)
    return select.run(recipe, step, lab.options)


def load(sealed: SealedRun, cache: Path) -> Any:
    import datasets

    return datasets.load_dataset(str(sealed.path("dataset")), cache_dir=str(cache))


def card_of(sealed: SealedRun) -> str:
    return sealed.path("dataset/README.md").read_text(encoding="utf-8")


GOOD = [trace(number) for number in range(10)]
HELDOUT = [prompt(50), prompt(51)]


# --- loading it -----------------------------------------------------------------------------------------------------


def test_the_folder_loads_with_its_splits_and_columns(lab: Any, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    splits = load(selected(lab, GOOD, HELDOUT), tmp_path / "cache")
    assert {name: split.num_rows for name, split in splits.items()} == {"train": 10, "heldout": 2}
    chat = [{"role": "user", "content": "3 + 1?"}]
    assert splits["train"][3] == {
        "prompt": chat,
        "reasoning": "3 and one",
        "answer": "\\boxed{4}",
        "messages": [*chat, {"role": "assistant", "content": "<think>\n3 and one\n</think>\n\n\\boxed{4}"}],
        "gold": "4",
        "source": "sums",
        "licence": "Apache-2.0",
        "trace_id": "t3",
        "prompt_id": prompt(3).prompt_id,
        "verdicts": [{"verifier": resolve("number").label, "outcome": "correct"}],
        "usage": {"input": 5, "output": 7, "reasoning": 3},
        "model": "deepseek-reasoner",
    }
    of_prompts = ("prompt", "gold", "source", "licence", "prompt_id")
    first = splits["heldout"][0]
    assert {name for name, value in first.items() if value} == set(of_prompts), "nothing to train on"
    assert first["prompt"] == [{"role": "user", "content": "50 + 1?"}] and first["gold"] == "51"


def test_without_held_out_prompts_there_is_one_split(lab: Any, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    sealed = selected(lab, GOOD)
    assert list(load(sealed, tmp_path / "cache")) == ["train"]
    assert "heldout" not in card_of(sealed).partition("# r")[0]


def test_what_trains_is_what_is_in_it(lab: Any) -> None:
    import pyarrow.parquet as pq

    wrong = trace(4, answer="\\boxed{0}")
    sealed = selected(lab, [*GOOD[:4], wrong], recipe=recipe_of(select={"reasoning": "none"}))
    table = pq.read_table(sealed.path("dataset/data/train-00000-of-00001.parquet"))
    assert table["trace_id"].to_pylist() == ["t0", "t1", "t2", "t3"]
    assert table["reasoning"].to_pylist() == [None] * 4
    assert table["messages"].to_pylist()[0][1]["content"] == "\\boxed{1}"


def test_chats_are_written_with_the_recipes_markers(lab: Any) -> None:
    import pyarrow.parquet as pq

    sealed = selected(lab, GOOD, recipe=recipe_of(format={"open_marker": "[[", "close_marker": "]]"}))
    table = pq.read_table(sealed.path("dataset/data/train-00000-of-00001.parquet"), columns=["messages"])
    assert table["messages"].to_pylist()[0][1]["content"] == "[[\n0 and one\n]]\n\n\\boxed{1}"
    assert "the reasoning inside `[[` and `]]`" in card_of(sealed)


def test_other_markers_make_another_selection(tmp_path: Path) -> None:
    def identity(**format: Any) -> str:
        file = tmp_path / "sums.jsonl"
        file.write_text('{"question": "1 + 1?", "answer": "2"}\n')
        source = {"name": "sums", "file": file}
        recipe = recipe_from({"prompts": [source], "teacher": {"engine": "solver"}, "format": format})
        return make_plan(recipe, RunOptions(tmp_path / "runs")).steps["select"].identity

    assert identity() == identity(max_tokens=64) != identity(open_marker="[[")


# --- the same every time --------------------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes(lab: Any) -> None:
    def digests(sealed: SealedRun) -> dict[str, str]:
        folder = sealed.path("dataset")
        return {path.name: file_digest(path) for path in folder.rglob("*") if path.is_file()}

    sealed = selected(lab, GOOD, HELDOUT)
    before = digests(sealed)
    sealed.path("stage.json").unlink()
    assert digests(selected(lab, GOOD, HELDOUT)) == before and len(before) == 3
    sealed.path("stage.json").unlink()
    assert digests(selected(lab, GOOD[1:], HELDOUT)) != before


def test_a_large_set_is_cut_into_files_that_say_how_many_there_are(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    verdict = Verdict(trace_id="t", gold="1", verifier="number@1", outcome="correct")
    with TrainingSet(tmp_path / "set", FormatConfig(), shard_bytes=20_000) as training_set:
        for number in range(900):
            one = trace(number)
            example = Example(prompt=prompt(number), trace_id=one.trace_id, reasoning=one.reasoning, answer=one.answer)
            training_set.add(example, one, verdict)
    names = [f"data/train-{number:05}-of-00005.parquet" for number in range(5)]
    assert [(file.name, file.rows) for file in training_set.files] == list(zip(names, [200, 200, 200, 200, 100]))
    ids = [one for name in names for one in pq.read_table(tmp_path / "set" / name)["trace_id"].to_pylist()]
    assert ids == [f"t{number}" for number in range(900)]
    assert all(file_digest(tmp_path / "set" / file.name) == file.sha256 for file in training_set.files)


def test_an_error_in_the_middle_leaves_no_files_behind_that_look_whole(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), TrainingSet(tmp_path / "set", FormatConfig()) as training_set:
        for number in range(300):
            training_set.add_heldout(prompt(number))
        1 // 0  # noqa: B018
    assert training_set.files == [] and not list(tmp_path.rglob("*-of-*"))


def test_without_pyarrow_only_the_folder_is_left_out_and_that_is_said(
    lab: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with_it = selected(lab, GOOD, HELDOUT)
    assert with_it.counts["dataset"]["files"] == 2
    with_it.path("stage.json").unlink()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    without = selected(lab, GOOD, HELDOUT)
    assert without.counts["dataset"] == {"left_out": MISSING} and "distill[train]" in MISSING
    assert f"select: the folder dataset/ is left out: {MISSING}" in capfd.readouterr().err
    assert not without.path("dataset").exists()
    assert without.digest == with_it.digest, "what trains is the same"


def test_the_folder_is_sealed_with_the_run(lab: Any) -> None:
    sealed = selected(lab, GOOD, HELDOUT)
    listed = json.loads(sealed.path("stage.json").read_text())["files"]
    assert {name for name in listed if name.startswith("dataset/")} == {
        "dataset/README.md",
        "dataset/data/train-00000-of-00001.parquet",
        "dataset/data/heldout-00000-of-00001.parquet",
    }
    assert not sealed.path("work").exists()


# --- the card -------------------------------------------------------------------------------------------------------


def test_the_cards_header_is_what_hubs_read(lab: Any) -> None:
    _, header, _ = card_of(selected(lab, GOOD, HELDOUT)).split("---\n", 2)
    assert yaml.safe_load(header) == {
        "pretty_name": "r",
        "license": ["apache-2.0", "mit"],
        "task_categories": ["text-generation"],
        "tags": ["reasoning", "knowledge-distillation", "synthetic", "distill"],
        "size_categories": ["n<1K"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": "train", "path": "data/train-*.parquet"},
                    {"split": "heldout", "path": "data/heldout-*.parquet"},
                ],
            }
        ],
    }


def test_the_card_says_what_became_of_every_trace_and_how_to_make_it_again(lab: Any) -> None:
    wrong, mixed = trace(8, answer="\\boxed{0}"), trace(9, reasoning="首先计算面积然后相加")
    sealed = selected(lab, [*GOOD[:8], wrong, mixed], HELDOUT)
    card = card_of(sealed)
    for line in (
        "| asked for | 10 |  |  |",
        "| language-mix | 9 | 1 | slips into a script that the prompt does not have |",
        "| wrong | 8 | 1 | answer did not match the reference |",
        "| **examples** | **8** |  | for 8 prompts |",
        "| sums | 9 | 1 | 0 | 0 | 0 | 10 |",
        "| deepseek-reasoner | not known | openai 2 | MIT | 8 |",
        "| sums | file `sums.jsonl` | Apache-2.0 | 8 | 2 |",
        "- Sampling: temperature 0.6, top_p 1, at most 2,048 tokens.",
        "- System prompt: none.",
        "Prompts were held against these evaluation sets: heldout (2 prompts).",
        "8 reasoning traces of deepseek-reasoner for 8 prompts, 56 tokens, verified and selected from 10",
    ):
        assert line in card, line
    assert sealed.digest in card and card.count("<details>") == 2
    assert sealed.counts["teachers"] == [R1.model_dump() | {"examples": 8}], "for the card of a student"
    for path in sealed.path("dataset/data").iterdir():
        assert file_digest(path) in card


def test_the_recipe_in_the_card_gives_the_same_selection_and_no_addresses_or_folders() -> None:
    recipe = recipe_of(select={"per_prompt": "shortest"}, format={"open_marker": "[["})
    shown = published_recipe(recipe)
    text = yaml.safe_dump(shown)
    assert not any(private in text for private in ("inside.example", "/home/ada", "usd", "OPENAI"))
    again = recipe_from(shown)
    assert again.select == recipe.select and again.format == recipe.format and again.name == "r"
    assert again.teacher is not None and recipe.teacher is not None
    assert again.teacher.sampling == recipe.teacher.sampling and again.teacher.licence == "MIT"
    assert again.prompts[0].licence == "Apache-2.0" and again.prompts[0].file == Path("sums.jsonl")


def test_local_folders_of_models_are_not_told() -> None:
    recipe = recipe_of(teacher={"engine": "transformers", "model": "/home/ada/models/r1"})
    assert published_recipe(recipe)["teacher"]["model"] == "r1"
    kept = recipe_of(teacher={"engine": "transformers", "model": "deepseek-ai/R1"})
    assert published_recipe(kept)["teacher"]["model"] == "deepseek-ai/R1"


def test_open_questions_of_licences_are_named(lab: Any) -> None:
    train = [prompt(0, licence=None), *(prompt(number, licence="CC BY-NC 4.0") for number in range(1, 10))]
    silent = [trace(number, teacher=R1.model_copy(update={"licence": "Own terms"})) for number in range(10)]
    card = card_of(selected(lab, silent, train=train))
    assert "license: unknown" in card
    assert "- prompt source sums: no licence is stated; once it is known, set prompts.0.licence in the recipe" in card
    assert "- prompt source sums: `cc-by-nc-4.0` forbids commercial use." in card
    assert "- teacher deepseek-reasoner: `Own terms` is no licence that hubs have an id for; read its terms." in card
    assert "- teacher deepseek-reasoner: `MIT` and `Own terms` are stated side by side." in card
    assert "Open questions" not in card_of(selected(lab, GOOD, recipe=recipe_of(name="clean")))


def test_text_of_examples_cannot_break_the_card(lab: Any) -> None:
    hostile = "```\n</details><script>alert(1)</script>\n| a | b |\n````\n---\nlicense: mit"
    odd = [prompt(number) for number in range(1, 10)]
    first = Prompt.of([Message(role="user", content=f"<b>{hostile}")], gold="1", source="sums", licence="MIT")
    one = trace(0, reasoning=hostile).model_copy(update={"prompt_id": first.prompt_id})
    card = card_of(selected(lab, [one, *GOOD[1:]], train=[first, *odd]))
    inside = card.partition("<summary>")[2].partition("</summary>")[0]
    assert "&lt;b&gt;" in inside and "<b>" not in inside
    assert fenced(hostile) == f"`````text\n{hostile}\n`````" and fenced(hostile) in card
    assert markdown_table(["a"], [["x | y\nz"]]) == "| a |\n| --- |\n| x \\| y z |"


@pytest.mark.parametrize(
    ("rows", "word"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**5, "100K<n<1M"), (10**9, "n>100M")]
)
def test_sizes_are_said_as_hubs_say_them(rows: int, word: str) -> None:
    assert size_category(rows) == word
