"""Rows of files and data sets: every kind is read alike, and every complaint names file, line and remedy."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import HubSource
from distill.errors import DataError
from distill.rows import Row, hub_root, read_hub, read_rows, require_columns
from distill.runs import DigestCache

ROWS = [{"question": "1 + 1 = ?", "answer": "2"}, {"question": "zwei\nZeilen, „Komma“", "answer": "3,5"}]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".parquet": write_parquet}


def read(path: Path, records_path: str | None = None) -> list[dict[str, object]]:
    return [row.values for row in read_rows(path, records_path)]


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, ROWS)
    assert read(path) == ROWS


def test_rows_of_json_lines_and_csv_know_their_line(tmp_path: Path) -> None:
    jsonl, table = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    jsonl.write_text('{"a": 1}\n\n{"a": 2}\n')
    table.write_text('a,b\n1,"two\nlines"\n3,4\n')
    assert [row.where for row in read_rows(jsonl)] == [f"{jsonl}:1", f"{jsonl}:3"]
    assert [row.where for row in read_rows(table)] == [f"{table}:3", f"{table}:4"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_rows(tmp_path: Path) -> None:
    jsonl, table, document = tmp_path / "a.jsonl", tmp_path / "a.csv", tmp_path / "a.json"
    jsonl.write_bytes(b'\xef\xbb\xbf{"a": "1"}\r\n{"a": "2"}\r\n')
    table.write_bytes(b"\xef\xbb\xbfa\r\n1\r\n2\r\n")
    document.write_bytes(b'\xef\xbb\xbf[{"a": "1"}, {"a": "2"}]')
    for path in (jsonl, table, document):
        assert read(path) == [{"a": "1"}, {"a": "2"}]


@given(st.text(max_size=50))
def test_any_text_in_a_json_line_stays_one_row(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    # U+2028, U+0085 and form feeds end lines for str.splitlines(), but never a row
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, [{"a": text}, {"a": "next"}])
    assert read(path) == [{"a": text}, {"a": "next"}]


def test_an_escaped_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n{"a": "\\uD83D\\uDE00"}\n')
    assert read(tmp_path / "rows.jsonl") == [{"a": "\N{GRINNING FACE}"}] * 2


def test_every_row_group_of_a_parquet_file_is_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"n": n, "text": f"row {n}", "list": [n, n + 1]} for n in range(2500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=700)
    assert read(tmp_path / "rows.parquet") == rows


def test_a_csv_field_may_be_as_long_as_a_reasoning_trace(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    write_csv(path, [{"a": "x" * 200_000}])  # the csv module's own limit is 131,072
    assert read(path) == [{"a": "x" * 200_000}]


def test_the_list_in_a_json_object_is_found_or_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"meta": {"n": 1}, "tags": ["x"], "results": ROWS}))
    assert read(path) == read(path, "results") == ROWS
    path.write_text(json.dumps({"data": {"train": ROWS, "test": ROWS[:1]}}))
    assert read(path, "data.test") == ROWS[:1]
    with pytest.raises(DataError, match=r"no key 'tests' \(did you mean 'test'\?\); keys there: train, test"):
        read(path, "data.tests")
    with pytest.raises(DataError, match="is a dict, not a list of rows"):
        read(path, "data")
    path.write_text(json.dumps({"a": ROWS, "b": ROWS}))
    with pytest.raises(DataError, match=r"found: a, b.*records_path"):
        read(path)


BROKEN = {
    "a.jsonl": ('{"a": 1}\nnope\n', r"a\.jsonl:2: not JSON: Expecting value at character 1"),
    "cut.jsonl": ('{"a": 1}\n{"a": "half', r"cut\.jsonl:2: not JSON"),
    "half.jsonl": ('{"a": 1}\n{"a": "\\ud83d"}\n', r"half\.jsonl:2: half of a surrogate pair"),
    "list.jsonl": ("[1]\n", r"list\.jsonl:1: a row is a JSON object with named columns; given: list"),
    "empty.jsonl": ("", r"empty\.jsonl: no rows in it"),
    "empty.json": ("", r"empty\.json: no rows in it"),
    "none.json": ("[]", r"none\.json: no rows in it"),
    "lines.json": ('{"a": 1}\n{"a": 2}', r"lines\.json: not JSON: Extra data.*name it \.jsonl"),
    "empty.csv": ("", r"empty\.csv: no rows in it"),
    "head.csv": ("a,b\n", r"head\.csv: no rows in it"),
    "short.csv": ("a,b\n1,2\n3\n", r"short\.csv:3: the row has not 2 fields"),
    "wide.csv": ("a,b\n1,2,3\n", r"wide\.csv:2: the row has not 2 fields"),
    "twice.csv": ("a,a\n1,2\n", r"twice\.csv:1: two columns are called 'a'"),
    "quote.csv": ('a\n"1\n', r"quote\.csv:\d: not CSV"),
    "bytes.parquet": ("PAR1 but no more", r"bytes\.parquet: not a whole Parquet file"),
    "rows.txt": ("a", r"rows\.txt: files of rows are \.jsonl, \.json, \.csv, \.parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_refused_in_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    text, message = BROKEN[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"a": "ok"}\n{"a": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not UTF-8"):
        read(path)


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "traces.jsonl", ROWS)
    with pytest.raises(DataError, match=r"trace\.jsonl: no such file \(did you mean 'traces\.jsonl'\?\)"):
        read(tmp_path / "trace.jsonl")
    with pytest.raises(DataError, match="nor its folder"):
        read(tmp_path / "nowhere" / "traces.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="a folder, not a file"):
        read(tmp_path / "folder.jsonl")


def test_a_missing_column_is_named_with_those_that_exist_and_the_nearest() -> None:
    row = Row("rows.jsonl:7", {"question": "q", "answer": "a"})
    require_columns(row, ["question", "answer"])
    with pytest.raises(DataError, match=r"rows\.jsonl:7: no column 'anwser' \(did you mean 'answer'\?\)") as caught:
        require_columns(row, ["question", "anwser"])
    assert str(caught.value).endswith("columns here: question, answer")


# --- the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "splits"))
    return tmp_path


def test_folders_saved_by_datasets_are_read_by_split(saved: Path) -> None:
    assert [row.values for row in read_hub(HubSource(id=str(saved / "one")))] == ROWS
    assert [row.values for row in read_hub(HubSource(id=str(saved / "splits"), split="test"))] == ROWS[1:]
    with pytest.raises(DataError, match=r"no split 'tset' \(did you mean 'test'\?\); splits there: train, test"):
        next(read_hub(HubSource(id=str(saved / "splits"), split="tset")))


def test_a_folder_of_data_files_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train.parquet", ROWS)
    source = HubSource(id=str(tmp_path / "data"))
    assert [row.values for row in read_hub(source)] == ROWS
    with pytest.raises(DataError, match="split"):
        next(read_hub(HubSource(id=source.id, split="nowhere")))


def test_a_local_data_set_is_identified_by_its_content(saved: Path) -> None:
    cache = DigestCache(saved / "digests.json")
    before = hub_root(HubSource(id=str(saved / "one")), cache)
    assert hub_root(HubSource(id=str(saved / "one")), cache) == before
    (saved / "one" / "added.arrow").write_bytes(b"more")
    assert hub_root(HubSource(id=str(saved / "one")), cache) != before


def test_an_offline_hub_is_said_to_be_so_with_the_remedy(tmp_path: Path) -> None:
    program = (
        "from distill.config import HubSource\nfrom distill.errors import DataError\n"
        "from distill.rows import read_hub\n"
        "try:\n    next(read_hub(HubSource(id='openai/gsm8k', config='main')))\n"
        "except DataError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    said = run.stdout.strip()
    assert said.startswith("hub data set openai/gsm8k (config main, split train, revision main): HF_HUB_OFFLINE is set")
    assert "give a local file instead" in said and "\n" not in said
