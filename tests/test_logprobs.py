"""The cache of distributions: what is written comes back, documents are found by their ids, misfits are refused."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from distill.config import Logprobs
from distill.errors import DataError
from distill.logprobs import (
    ALIGNMENT,
    Facts,
    Layout,
    LogprobCache,
    Rows,
    document_key,
    empty_rows,
    from_bytes,
    joined_rows,
    require_fit,
    to_bytes,
    write_manifest,
    write_shard,
)

FACTS = Facts("hybrid", 3, 7, 1.0, 0, 500, "t" * 64)


def made(count: int, facts: Facts = FACTS, seed: int = 0) -> Rows:
    """Rows of random heads and draws, as a form has them."""
    rng = np.random.default_rng(seed)
    rows = empty_rows(count, facts.k)
    if facts.k:
        weights = rng.dirichlet(np.ones(facts.k + 1), size=count).clip(1e-6)
        weights /= weights.sum(-1, keepdims=True)
        ids = np.array([rng.choice(facts.vocabulary, facts.k, replace=False) for _ in range(count)]).reshape(
            -1, facts.k
        )
        rows = rows._replace(
            head_ids=ids.reshape(-1, facts.k), head_log_p=np.log(weights[:, :-1]).astype(np.float32),
            tail_log_p=np.log(weights[:, -1]).astype(np.float32),
        )  # fmt: skip
    if facts.draws:
        drawn = [np.unique(rng.integers(0, facts.vocabulary, facts.draws), return_counts=True) for _ in range(count)]
        rows = rows._replace(
            sizes=np.array([len(ids) for ids, _ in drawn], np.int64),
            ids=np.concatenate([ids for ids, _ in drawn]) if drawn else np.zeros(0, np.int64),
            counts=np.concatenate([counts for _, counts in drawn]) if drawn else np.zeros(0, np.int64),
        )
    return rows


def written(folder: Path, documents: Sequence[tuple[list[int], Rows]], facts: Facts = FACTS, size: int = 2) -> Path:
    """A cache of documents, so many a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for at in range(0, len(documents), size):
        paths.append(folder / f"shard-{at // size:05d}.safetensors")
        write_shard(paths[-1], [(document_key(ids), rows) for ids, rows in documents[at : at + size]], facts)
    write_manifest(folder, facts, paths, {"name": "big"})
    return folder


DOCUMENTS = [([1, 2, 3, number], made(count, seed=number)) for number, count in enumerate((2, 5, 1, 4, 3))]


# --- round trip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["topk", "sampled", "hybrid"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_document_meets_its_own_rows(form: Any, size: int, tmp_path: Path) -> None:
    facts = FACTS._replace(form=form, k=0 if form == "sampled" else 3, draws=0 if form == "topk" else 7)
    documents = [(ids, made(rows.number, facts, seed=ids[-1])) for ids, rows in DOCUMENTS]
    cache = LogprobCache(written(tmp_path / "cache", documents, facts, size))
    cache.check_bytes()
    assert len(cache) == 5 and cache.facts == facts
    for ids, rows in reversed(documents):
        found = cache.rows(np.array(ids, np.int32), rows.number)
        for name in ("head_ids", "sizes", "ids", "counts", "seen"):
            assert np.array_equal(getattr(found, name), getattr(rows, name)), name
        assert np.allclose(found.head_log_p, rows.head_log_p, atol=5e-3)
        if facts.k:
            whole = np.exp(found.head_log_p).sum(-1) + np.exp(found.tail_log_p)
            assert np.allclose(whole, 1, atol=1e-6), "scaled, so that fp16 leaves no first-order error"
        if facts.draws:
            assert (np.add.reduceat(found.counts, np.cumsum([0, *found.sizes])[:-1]) == facts.draws).all()


@given(st.lists(st.integers(0, 2**40 - 1), max_size=20), st.integers(5, 8))
def test_numbers_of_any_width_come_back(values: list[int], width: int) -> None:
    assert from_bytes(to_bytes(np.array(values, np.int64), width)).tolist() == values


@pytest.mark.parametrize(
    ("vocabulary", "draws", "layout"),
    [
        (49_152, 50, (2, 16, 3)),
        (151_936, 50, (3, 18, 3)),
        (151_936, 65, (3, 18, 4)),
        (2, 1, (1, 1, 1)),
        (256, 0, (1, 8, 1)),
    ],
)
def test_ids_and_counts_take_as_few_bytes_as_they_can(vocabulary: int, draws: int, layout: tuple[int, ...]) -> None:
    facts = FACTS._replace(vocabulary=vocabulary, draws=draws)
    assert tuple(Layout.of(facts)) == layout


@given(st.data())
def test_the_largest_id_and_count_fit(data: st.DataObject) -> None:
    facts = FACTS._replace(
        form="sampled", k=0, draws=data.draw(st.integers(1, 300)), vocabulary=data.draw(st.integers(2, 200_000))
    )
    layout = Layout.of(facts)
    assert (facts.vocabulary - 1) | ((facts.draws - 1) << layout.id_bits) < 1 << (8 * layout.entry_bytes)


def test_the_key_is_the_start_of_a_sha256_over_little_endian_int32() -> None:
    expected = hashlib.sha256(bytes([1, 0, 0, 0, 0, 1, 0, 0])).digest()[:16]
    assert document_key([1, 256]) == expected == document_key(np.array([1, 256], np.int64))


def test_another_program_can_read_a_shard_by_the_written_format(tmp_path: Path) -> None:
    folder = written(tmp_path / "cache", DOCUMENTS, size=5)
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = load_file(folder / manifest["shards"][0]["file"])
    place = [bytes(key) for key in tensors["keys"]].index(document_key([1, 2, 3, 1]))
    start, end = tensors["row_bounds"][place : place + 2]
    first, last = tensors["entry_bounds"][place : place + 2]
    rows = DOCUMENTS[1][1]
    assert end - start == 5 and tensors["row_entries"][start:end].tolist() == rows.sizes.tolist()
    numbers = [int.from_bytes(bytes(entry), "little") for entry in tensors["entries"][first:last]]
    bits = manifest["layout"]["id_bits"]
    assert [number & ((1 << bits) - 1) for number in numbers] == rows.ids.tolist()
    assert [(number >> bits) + 1 for number in numbers] == rows.counts.tolist()
    heads = [[int.from_bytes(bytes(one), "little") for one in row] for row in tensors["head_ids"][start:end]]
    assert heads == rows.head_ids.tolist() and manifest["alignment"] == ALIGNMENT


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = (written(tmp_path / name, DOCUMENTS) for name in ("one", "two"))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_rows_that_are_not_seen_stay_so(tmp_path: Path) -> None:
    rows = made(3)
    rows.seen[1] = False
    cache = LogprobCache(written(tmp_path / "cache", [([9], rows), ([8], made(2))], size=1))
    assert cache.rows([9], 3).seen.tolist() == [True, False, True] and cache.rows([8], 2).seen.all()


def test_joined_rows_follow_one_another() -> None:
    parts = [rows for _, rows in DOCUMENTS]
    whole = joined_rows(parts)
    assert whole.number == 15 and whole.sizes.sum() == len(whole.ids) == sum(len(rows.ids) for rows in parts)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_document_that_was_not_scored_or_has_other_segments_is_refused(tmp_path: Path) -> None:
    cache = LogprobCache(written(tmp_path / "cache", DOCUMENTS))
    with pytest.raises(DataError, match="not in the cache"):
        cache.rows([1, 2, 3, 99], 2)
    with pytest.raises(DataError, match="has 3 supervised tokens, but 2 were scored"):
        cache.rows([1, 2, 3, 0], 3)


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("temperature", 2.0, "at one temperature"), ("tokenizer", "u" * 64, "another tokenizer or chat template"),
        ("alignment", "shifted by one", "about other tokens"), ("k", 4, "logprobs as it was"),
        ("draws", 8, "logprobs as it was"), ("form", "topk", "logprobs as it was"), ("vocabulary", 501, "as it was"),
        ("seed", 3, "as it was"),
    ],
)  # fmt: skip
def test_whatever_differs_is_named_with_what_to_do(name: str, value: Any, remedy: str) -> None:
    require_fit(FACTS, FACTS, Path("cache"))
    with pytest.raises(DataError, match=f"cache's {name} is .*{remedy}"):
        require_fit(FACTS._replace(**{name: value}), FACTS, Path("cache"))


@pytest.mark.parametrize("harm", ["no manifest", "torn manifest", "other schema", "no shard", "cut shard"])
def test_a_damaged_cache_is_refused_when_it_is_opened(harm: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "cache", DOCUMENTS)
    manifest, shard = folder / "manifest.json", folder / "shard-00001.safetensors"
    if harm == "no manifest":
        manifest.unlink()
    elif harm == "torn manifest":
        manifest.write_text(manifest.read_text()[:40])
    elif harm == "other schema":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": 99}))
    elif harm == "no shard":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(DataError, match="score the traces"):
        LogprobCache(folder)


def test_a_flipped_byte_is_found_by_the_checksums(tmp_path: Path) -> None:
    folder = written(tmp_path / "cache", DOCUMENTS)
    shard = folder / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"shard-00000\.safetensors: holds other bytes"):
        LogprobCache(folder).check_bytes()


def test_facts_of_a_recipe_hold_only_what_its_form_has() -> None:
    teachers = [{"name": "big", "model": "a/b"}]
    assert Facts.of(Logprobs(teachers=teachers, form="topk", seed=3), 40, "t")[:5] == ("topk", 40, 0, 1.0, 0)
    assert Facts.of(Logprobs(teachers=teachers, form="sampled", seed=3), 40, "t")[:5] == ("sampled", 0, 50, 1.0, 3)
    assert Facts.of(Logprobs(teachers=teachers, form="hybrid", k=8), 40, "t")[:5] == ("hybrid", 8, 50, 1.0, 0)


def test_sizes_on_disk_are_what_the_layout_promises(tmp_path: Path) -> None:
    facts = Facts("topk", 64, 0, 1.0, 0, 151_936, "t" * 64)
    folder = written(tmp_path / "cache", [([1], made(2000, facts))], facts)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert math.isclose(size / 2000, 64 * 5 + 4, rel_tol=0.01) and size / 2000 <= 330
