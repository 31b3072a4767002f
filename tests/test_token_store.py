"""The store of tokenized data: the same documents however they are made, made once, and never trusted when damaged."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import token_store
from distill.config import FormatConfig
from distill.documents import Documents, encode_examples
from distill.errors import DataError, FormatError, LockedError, TrainingError
from distill.format import set_template
from distill.models import find_model, load_tokenizer
from distill.records import Example, Message, Prompt, write_records
from distill.runs import RunOptions, locked
from distill.token_store import tokenize, tokenizer_digest

TinyModel = Callable[[str], Path]
ENDS = [2]
ARRAYS = ("ids_T.npy", "segments_T.npy", "bounds.npy")


def example(a: int, b: int) -> Example:
    return Example(
        prompt=Prompt.of([Message(role="user", content=f"{a} + {b}? 🙂")]),
        trace_id=f"{a}-{b}",
        reasoning=None if b % 3 == 0 else f"{a} + {b} = {a + b}\u2028二" + " so" * (b % 5),
        answer=f"\\boxed{{{a + b}}}",
    )


EXAMPLES = [example(a, b) for a in range(5) for b in range(6)]


@pytest.fixture
def tokenizer(tiny_model: TinyModel) -> Any:
    return load_tokenizer(find_model(str(tiny_model("llama"))))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    write_records(tmp_path / "examples.jsonl", EXAMPLES)
    return tmp_path / "examples.jsonl"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of three examples or so instead of many thousand; workers are told where theirs begin and end."""
    monkeypatch.setattr(token_store, "PART_BYTES", 700)


def options(runs: Path, threads: int = 1) -> RunOptions:
    return RunOptions(runs=runs, threads=threads, quiet=True)


def store(
    rows: Path, tokenizer: Any, runs: Path, threads: int = 1, ends: Sequence[int] = ENDS, **config: Any
) -> Documents:
    chosen = FormatConfig(**({"max_tokens": 512} | config))
    return tokenize(rows, "examples", tokenizer, chosen, ends, options(runs, threads), "examples")


def in_memory(tokenizer: Any) -> Documents:
    return encode_examples(EXAMPLES, tokenizer, FormatConfig(max_tokens=512), 512, ENDS)


def content(documents: Documents) -> list[tuple[list[int], bytes]]:
    return [(documents.ids(i).tolist(), documents.segments(i).tobytes()) for i in range(len(documents))]


def folder_of(runs: Path) -> Path:
    [folder] = (runs / "tokens").iterdir()
    return folder


def files_of(runs: Path) -> dict[str, bytes]:
    """What the only set of a store holds, without its lock."""
    folder = folder_of(runs)
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."
    }


class Watched:
    """A tokenizer that notes what it renders, and dies instead of the rendering after `lasts` of them."""

    def __init__(self, inner: Any, lasts: int = 1_000_000) -> None:
        self.inner, self.lasts = inner, lasts
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: str, **given: Any) -> Any:
        return self.inner(text, **given)

    def apply_chat_template(self, messages: Any, **given: Any) -> Any:
        if len(self.asked) == self.lasts:
            raise KeyboardInterrupt
        self.asked.append(messages[-1]["content"])
        return self.inner.apply_chat_template(messages, **given)


# --- the same documents ---------------------------------------------------------------------------------------------


def test_a_store_holds_the_documents_that_are_made_in_memory(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    made, expected = store(rows, tokenizer, tmp_path / "runs"), in_memory(tokenizer)
    assert content(made) == content(expected)
    assert made.lengths.tolist() == expected.lengths.tolist()
    assert made.counts == expected.counts == {"documents": 30, "too_long": 0, "seam_differs": 0}
    assert [array.dtype for array in made.parts[0]] == [array.dtype for array in expected.parts[0]]


def test_documents_do_not_depend_on_how_many_parts_they_are_made_in(
    rows: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = in_memory(tokenizer)
    for size in (1, 300, 5_000):
        monkeypatch.setattr(token_store, "PART_BYTES", size)
        made = store(rows, tokenizer, tmp_path / f"runs-{size}")
        assert content(made) == content(expected)
        assert made.counts == expected.counts
        assert set(files_of(tmp_path / f"runs-{size}")) == {*ARRAYS, "manifest.json"}


def test_rows_without_a_line_break_at_the_end_are_whole(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows.write_bytes(rows.read_bytes().removesuffix(b"\n"))
    assert content(store(rows, tokenizer, tmp_path / "runs")) == content(in_memory(tokenizer))


@pytest.mark.usefixtures("small_parts")
def test_parts_whose_documents_are_all_too_long_are_counted_and_leave_the_rest(
    rows: Path, tokenizer: Any, tmp_path: Path
) -> None:
    long = [one.model_copy(update={"answer": "4 " * 600}) for one in EXAMPLES[:9]]
    write_records(rows, [*long, *EXAMPLES[9:]])
    made = store(rows, tokenizer, tmp_path / "runs")
    assert made.counts == {"documents": 21, "too_long": 9, "seam_differs": 0}
    assert content(made) == content(in_memory(tokenizer))[9:]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.slow
def test_a_store_has_the_same_bytes_however_many_processes_made_it(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.add_tokens(["<think>", "</think>"])  # what workers load must be what was given, not the base's
    tokenizer.chat_template = "Ask: {{ messages[0].content }}\nSay: "
    one, two = (store(rows, tokenizer, tmp_path / f"runs-{n}", threads=n) for n in (1, 2))
    assert files_of(tmp_path / "runs-1") == files_of(tmp_path / "runs-2")
    assert one.digest == two.digest
    assert content(one) == content(two) == content(in_memory(tokenizer))


# --- made once ------------------------------------------------------------------------------------------------------


def test_a_second_call_makes_nothing(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    first = store(rows, tokenizer, tmp_path / "runs")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")}
    again = store(rows, Watched(tokenizer, lasts=0), tmp_path / "runs")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")} == times
    assert content(again) == content(first)
    assert (again.digest, again.counts) == (first.digest, first.counts)


def test_a_set_is_known_by_rows_tokenizer_template_format_and_ends_and_not_by_where_it_lies(
    rows: Path, tokenizer: Any, tmp_path: Path, tiny_model: TinyModel
) -> None:
    runs = tmp_path / "runs"

    def new_sets(*given: Any, **config: Any) -> int:
        before = len(list((runs / "tokens").glob("*")))
        store(*given, **config)
        return len(list((runs / "tokens").glob("*"))) - before

    assert new_sets(rows, tokenizer, runs) == 1
    # what changes nothing
    elsewhere = tmp_path / "elsewhere" / "other-name.jsonl"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(rows.read_bytes())
    assert new_sets(elsewhere, tokenizer, runs) == 0
    assert new_sets(rows, load_tokenizer(find_model(str(tiny_model("llama")))), runs) == 0
    assert new_sets(rows, tokenizer, runs, 2) == 0, "processes"
    tokenizer(["4", "4 + 4"], padding=True, truncation=True, max_length=3)
    assert new_sets(rows, tokenizer, runs) == 0, "what the last call was asked for"
    # what makes it another set
    assert new_sets(rows, tokenizer, runs, max_tokens=500) == 1
    assert new_sets(rows, tokenizer, runs, system="Be brief.") == 1
    assert new_sets(rows, tokenizer, runs, open_marker="<why>") == 1
    assert new_sets(rows, tokenizer, runs, ends=[2, 0]) == 1
    assert new_sets(rows, tokenizer, runs, ends=[0, 2]) == 0, "ends have no order"
    tokenizer.chat_template += "{# another #}"
    assert new_sets(rows, tokenizer, runs) == 1
    tokenizer.add_tokens(["<think>"])
    assert new_sets(rows, tokenizer, runs) == 1
    tokenizer.eos_token = "<|endoftext|>"
    assert new_sets(rows, tokenizer, runs, ends=[0, 2]) == 1
    write_records(rows, EXAMPLES[1:])
    assert new_sets(rows, tokenizer, runs, ends=[0, 2]) == 1


def test_a_template_file_counts_by_its_text_and_not_by_its_path(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    made = []
    for name, text in (("a", "{{ messages[0].content }}:"), ("b", "{{ messages[0].content }}:"), ("c", "Q{# #}")):
        path = tmp_path / f"{name}.jinja"
        path.write_text(text)
        set_template(tokenizer, FormatConfig(template=str(path)))
        store(rows, tokenizer, tmp_path / "runs", template=str(path))
        made.append(len(list((tmp_path / "runs" / "tokens").iterdir())))
    assert made == [1, 1, 2]


def test_a_tokenizer_that_cannot_say_where_its_tokens_stand_is_refused(rows: Path, tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(FormatError, match="cannot say where its tokens stand in a text"):
        store(rows, ByT5Tokenizer(), tmp_path / "runs")


def test_a_saved_tokenizer_has_the_digest_of_the_live_one(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    before = tokenizer_digest(tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path / "saved")) == tokenizer_digest(tokenizer) != before


def test_two_processes_do_not_make_the_same_set_at_once(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    store(rows, tokenizer, tmp_path / "runs")
    folder = folder_of(tmp_path / "runs")
    with locked(folder, "another is at it"):
        assert len(store(rows, tokenizer, tmp_path / "runs")) == 30, "a finished set takes no lock"
        (folder / "manifest.json").unlink()
        with pytest.raises(LockedError, match=f"examples is being tokenized by process {os.getpid()}"):
            store(rows, tokenizer, tmp_path / "runs")


# --- killed midway --------------------------------------------------------------------------------------------------


def parts_of(folder: Path) -> dict[str, int]:
    """The finished parts with the times their files were written."""
    done = [path.stem for path in (folder / "parts").glob("*.json")]
    return {p.name: p.stat().st_mtime_ns for p in (folder / "parts").glob("*-*") if p.stem.rpartition("-")[0] in done}


@pytest.mark.usefixtures("small_parts")
def test_a_killed_tokenization_goes_on_without_making_a_finished_part_again(
    rows: Path, tokenizer: Any, tmp_path: Path
) -> None:
    store(rows, tokenizer, tmp_path / "whole")
    first, runs = Watched(tokenizer, lasts=40), tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt):
        store(rows, first, runs)
    folder = folder_of(runs)
    assert not (folder / "manifest.json").exists()
    records = sorted((folder / "parts").glob("*.json"))
    done = sum(json.loads(path.read_text())["counts"]["documents"] for path in records)
    assert len(records) > 2 and 0 < done < len(EXAMPLES)

    second = Watched(tokenizer)
    store(rows, second, runs)
    owed = [one.prompt.messages[0].content for one in EXAMPLES[done:]]
    assert list(dict.fromkeys(second.asked)) == owed, "what is finished is not looked at again"
    assert files_of(runs) == files_of(tmp_path / "whole")


@pytest.mark.usefixtures("small_parts")
def test_parts_of_another_size_are_not_mistaken_for_ones_own(
    rows: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that cuts rows otherwise goes on with what an older one left."""
    with pytest.raises(KeyboardInterrupt):
        store(rows, Watched(tokenizer, lasts=40), tmp_path / "runs")
    monkeypatch.setattr(token_store, "PART_BYTES", 1500)
    assert content(store(rows, tokenizer, tmp_path / "runs")) == content(in_memory(tokenizer))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("moment", ["before the manifest", "in the middle of an array", "after the manifest"])
def test_a_kill_while_parts_are_joined_costs_the_joining_alone(
    rows: Path, tokenizer: Any, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(rows, tokenizer, tmp_path / "whole")

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    target: Any = {
        "before the manifest": (token_store, "_join"),
        "in the middle of an array": (np.memmap, "flush"),
        "after the manifest": (token_store.shutil, "rmtree"),
    }[moment]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*target, die)
        store(rows, tokenizer, tmp_path / "runs")
    made = store(rows, Watched(tokenizer, lasts=0), tmp_path / "runs")
    assert content(made) == content(in_memory(tokenizer))
    whole = files_of(tmp_path / "whole")
    assert {name: data for name, data in files_of(tmp_path / "runs").items() if name in whole} == whole


TOKENIZING = """
import sys
from pathlib import Path
from distill.config import FormatConfig
from distill.models import find_model, load_tokenizer
from distill.runs import RunOptions
from distill import token_store

if __name__ == "__main__":
    rows, model, runs = map(Path, sys.argv[1:])
    token_store.PART_BYTES = 700
    tokenizer = load_tokenizer(find_model(str(model)))
    options = RunOptions(runs=runs, threads=2, quiet=True)
    token_store.tokenize(rows, "examples", tokenizer, FormatConfig(max_tokens=512), [2], options, "examples")
"""


def processes_of(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(own) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_tokenization_in_several_processes_can_be_killed_outright_and_leaves_no_worker_behind(
    tokenizer: Any, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, runs = tmp_path / "examples.jsonl", tmp_path / "runs"
    write_records(rows, [example(a, b) for a in range(40) for b in range(6)])
    (tmp_path / "work.py").write_text(TOKENIZING)
    command = [sys.executable, str(tmp_path / "work.py"), str(rows), str(tiny_model("llama")), str(runs)]
    process = subprocess.Popen(command, start_new_session=True, cwd=tmp_path)
    try:
        wait_until(lambda: list(runs.glob("tokens/*/parts/*.json")))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        wait_until(lambda: not processes_of(process.pid), seconds=10)
    finally:
        for left in processes_of(process.pid):
            os.kill(left, signal.SIGKILL)
    monkeypatch.setattr(token_store, "PART_BYTES", 700)
    folder = folder_of(runs)
    assert not (folder / "manifest.json").exists()
    finished = parts_of(folder)
    assert finished
    second = Watched(tokenizer)
    store(rows, second, runs)
    assert 0 < len(set(second.asked)) < 240
    store(rows, tokenizer, tmp_path / "whole")
    assert files_of(runs) == files_of(tmp_path / "whole")


# --- what is refused ------------------------------------------------------------------------------------------------


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def cut_off_in_its_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def shorten(path: Path) -> None:
    """A whole array, but not the one that belongs there."""
    array = np.load(path)
    np.save(path, array[:-1])


DAMAGES = [
    *((name, damage) for name in ARRAYS for damage in (cut_off, cut_off_in_its_header, make_empty, overwrite, shorten)),
    *((name, Path.unlink) for name in ARRAYS),
    *(("manifest.json", damage) for damage in (cut_off, make_empty, overwrite)),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_set_is_refused_with_the_remedy(
    rows: Path, tokenizer: Any, tmp_path: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    store(rows, tokenizer, tmp_path / "runs")
    folder = folder_of(tmp_path / "runs")
    damage(folder / name)
    with pytest.raises(DataError, match=rf"{folder.name}: cannot be read; delete the folder and run again"):
        store(rows, tokenizer, tmp_path / "runs")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert content(store(rows, tokenizer, tmp_path / "runs")) == content(in_memory(tokenizer))


def test_a_set_that_is_mostly_too_long_is_refused_every_time_and_made_once(
    rows: Path, tokenizer: Any, tmp_path: Path
) -> None:
    lengths = in_memory(tokenizer).lengths
    longer = {limit: int((lengths > limit).sum()) for limit in range(1, 512)}
    half = min(limit for limit, lost in longer.items() if lost <= 15)
    assert store(rows, tokenizer, tmp_path / "runs", max_tokens=half).counts["too_long"] == longer[half]
    message = rf"{longer[half - 1]} of 30 documents are longer than format\.max_tokens={half - 1};"
    for watched in (Watched(tokenizer), Watched(tokenizer, lasts=0)):
        with pytest.raises(TrainingError, match=message):
            store(rows, watched, tmp_path / "runs", max_tokens=half - 1)


def test_rows_without_any_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_bytes(b"")
    with pytest.raises(TrainingError, match="no examples to train on"):
        store(tmp_path / "none.jsonl", tokenizer, tmp_path / "runs")


# --- memory ---------------------------------------------------------------------------------------------------------


def test_documents_of_a_store_are_mapped_from_its_files_and_cannot_be_written_to(
    rows: Path, tokenizer: Any, tmp_path: Path
) -> None:
    made = store(rows, tokenizer, tmp_path / "runs")
    [part] = made.parts
    assert all(isinstance(array, np.memmap) for array in part)
    assert np.shares_memory(made.subset([3, 1]).ids(0), part.ids_T)
    with pytest.raises(ValueError, match="read-only"):
        made.ids(0)[0] = 1


def test_opening_a_store_takes_the_memory_of_its_index_and_not_of_its_tokens(tokenizer: Any, tmp_path: Path) -> None:
    rows, runs = tmp_path / "long.jsonl", tmp_path / "runs"
    write_records(rows, [one.model_copy(update={"answer": "4 + 4 = 8. " * 1500}) for one in EXAMPLES])
    store(rows, tokenizer, runs, max_tokens=100_000)
    size = (folder_of(runs) / "ids_T.npy").stat().st_size
    tracemalloc.start()
    try:
        made = store(rows, Watched(tokenizer, lasts=0), runs, max_tokens=100_000)
        kept, _ = tracemalloc.get_traced_memory()
        loaded = [np.array(array) for array in made.parts[0]]
        with_tokens, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 500_000
    assert kept < size / 2
    assert with_tokens - kept >= size == loaded[0].nbytes + 128, "the measure sees arrays that are read"
