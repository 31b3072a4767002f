"""Digests that are remembered: what is read once, what is read again, and that no change goes unnoticed."""

import json
import os
import time
from pathlib import Path

import pytest

from distill import runs
from distill.errors import RunError
from distill.runs import STAGE_FILE, DigestCache, file_digest, open_sealed

BIG = 1 << 20


def old_file(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A large file that counts as being at rest (two seconds are long for a test)."""
    path.write_bytes(content * (BIG // len(content)))
    monkeypatch.setattr(runs, "AT_REST_NS", 0)
    time.sleep(0.01)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read whole."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(runs, "file_digest", counted)
    return names


def test_a_large_file_is_read_once_and_again_when_it_changes(
    reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, small = old_file(tmp_path / "big", b"ab", monkeypatch), tmp_path / "small"
    small.write_bytes(b"x")
    place = tmp_path / "cache" / "digests.json"
    first = DigestCache(place).of_all([path, small])
    assert DigestCache(place).of_all([path, small]) == first == [file_digest(path), file_digest(small)]
    assert reads == ["big", "small", "small"]
    old_file(path, b"cd", monkeypatch)
    assert DigestCache(place).of(path) == file_digest(path) != first[0]
    assert len(json.loads(place.read_text())) == 1, "a file has one entry"


def test_a_change_that_hides_its_time_is_noticed(
    reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = old_file(tmp_path / "big", b"ab", monkeypatch)
    cache = DigestCache(tmp_path / "digests.json")
    cache.of(path)
    before = path.stat()
    path.write_bytes(b"ba" * (BIG // 2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert cache.of(path) == file_digest(path) and reads == ["big", "big"]


def test_a_file_that_has_only_just_changed_is_not_remembered(reads: list[str], tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"ab" * BIG)
    cache = DigestCache(tmp_path / "digests.json")
    assert cache.of(path) == cache.of(path) and reads == ["big", "big"]


def test_a_sealed_run_is_read_once_by_all_processes_and_refused_when_it_changes(
    reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    folder.mkdir()
    shards = [old_file(folder / f"shard-{n}", bytes([97 + n, 98]), monkeypatch) for n in range(3)]
    files = {path.name: {"sha256": file_digest(path), "bytes": BIG} for path in shards}
    (folder / STAGE_FILE).write_text(json.dumps({"files": files}))
    for _ in range(2):
        runs._checked.clear()  # as another process would find it
        open_sealed(folder)
    assert reads == [path.name for path in shards]
    before = shards[1].stat()
    content = bytearray(shards[1].read_bytes())
    content[7] ^= 1
    shards[1].write_bytes(content)
    os.utime(shards[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(RunError, match="shard-1: holds other bytes"):
        open_sealed(folder)
    assert reads[3:] == ["shard-1"]
