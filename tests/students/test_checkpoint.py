"""Checkpoints on the disk: whole or absent, the newest readable one, written while training goes on."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.errors import TrainingError
from distill.students.checkpoint import CheckpointWriter, checkpoints, load_newest, read_state, write_state

FULL = Path("/dev/full")


def state_of(step: int, size: int = 2) -> dict[str, Any]:
    return {"data": "d", "weights": {"w": torch.full((size,), float(step))}}


def written(folder: Path, *steps: int, keep: int = 2, size: int = 2) -> list[Path]:
    writer = CheckpointWriter(folder, keep)
    for step in steps:
        writer.save(step, state_of(step, size))
    writer.finish()
    return checkpoints(folder)


def steps_in(folder: Path) -> list[int]:
    return [int(path.stem.rpartition("-")[2]) for path in checkpoints(folder)]


def test_what_is_saved_comes_back_with_its_step(tmp_path: Path) -> None:
    state = {"data": "d", "nested": {"a": {"step": 3, "x": torch.arange(4.0)}}, "stopping": {"best": None}}
    writer = CheckpointWriter(tmp_path)
    writer.save(7, state)
    writer.finish()
    found = load_newest(tmp_path, {"data": "d"})
    assert found is not None and found.keys() == {"step", *state}
    assert found["step"] == 7 and found["stopping"] == {"best": None}
    assert found["nested"]["a"]["step"] == 3 and torch.equal(found["nested"]["a"]["x"], torch.arange(4.0))


def test_the_two_newest_checkpoints_are_kept_and_unfinished_ones_do_not_count(tmp_path: Path) -> None:
    written(tmp_path, 2, 4, 6)
    (tmp_path / "checkpoint-00000008.pt.part").write_bytes(b"half")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000004.pt", "checkpoint-00000006.pt"]
    state = load_newest(tmp_path, {"data": "d"})
    assert state and state["step"] == 6 and state["weights"]["w"].tolist() == [6, 6]
    assert load_newest(tmp_path / "none", {}) is None


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_as_many_as_asked_for_are_kept_in_the_order_of_their_steps(tmp_path: Path, keep: int) -> None:
    (tmp_path / "best.pt").write_bytes(b"kept beside them")
    written(tmp_path, 8, 9, 10, 99, 100, keep=keep)
    assert steps_in(tmp_path) == [8, 9, 10, 99, 100][-keep:]
    assert (tmp_path / "best.pt").exists()


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    older, newer = written(tmp_path, 2, 4, size=1000)
    newer.write_bytes(newer.read_bytes()[: int(share * newer.stat().st_size)])
    state = load_newest(tmp_path, {"data": "d"})
    assert state and state["step"] == 2
    assert "checkpoint-00000004.pt: damaged, passed over" in capsys.readouterr().err
    older.write_bytes(b"")
    with pytest.raises(TrainingError, match="no checkpoint can be read; delete the folder"):
        load_newest(tmp_path, {"data": "d"})


@pytest.mark.parametrize("garbage", [b"not a checkpoint at all\n" * 50, b"\x80\x02.", b"PK\x03\x04" + b"\0" * 500])
def test_what_is_no_checkpoint_is_passed_over_too(tmp_path: Path, garbage: bytes) -> None:
    _, newer = written(tmp_path, 2, 4)
    newer.write_bytes(garbage)
    state = load_newest(tmp_path, {})
    assert state and state["step"] == 2


def test_a_checkpoint_of_other_data_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    written(tmp_path, 2, 4)
    with pytest.raises(TrainingError, match=r"checkpoint-00000004\.pt: was written for another data \('d', now 'e'\)"):
        load_newest(tmp_path, {"data": "e"})
    with pytest.raises(TrainingError, match=r"another steps \(None, now 3\); delete .* to start this stage again"):
        load_newest(tmp_path, {"data": "d", "steps": 3})


# --- writing in the background --------------------------------------------------------------------------------------


class Slow:
    """A value that is pickled only once the gate is open."""

    gate = threading.Event()

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.gate.wait(20)
        return (dict, ())


def test_saving_returns_at_once_and_the_next_one_waits_for_it(tmp_path: Path) -> None:
    Slow.gate.clear()
    writer = CheckpointWriter(tmp_path)
    writer.save(1, {"x": Slow()})
    assert steps_in(tmp_path) == [], "it is still being written"
    opener = threading.Timer(0.1, Slow.gate.set)
    opener.start()
    writer.save(2, {"x": torch.zeros(1)})
    assert 1 in steps_in(tmp_path), "the second begins when the first is whole"
    writer.finish()
    opener.join()
    assert steps_in(tmp_path) == [1, 2]


def test_finishing_without_anything_to_finish_is_fine(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.finish()
    written(tmp_path, 1)
    writer.finish()


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
@pytest.mark.parametrize("size", [2, 1_000_000])
def test_a_full_disk_surfaces_and_leaves_the_checkpoints_before(tmp_path: Path, size: int) -> None:
    written(tmp_path, 1)
    (tmp_path / "checkpoint-00000002.pt.part").symlink_to(FULL)  # every write to it fails with ENOSPC
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(2, state_of(2, size))
    with pytest.raises(OSError, match="No space left") as refused:
        writer.finish()
    assert refused.value.errno == errno.ENOSPC
    assert steps_in(tmp_path) == [1], "nothing is deleted before the new one is whole"
    state = load_newest(tmp_path, {"data": "d"})
    assert state and state["step"] == 1

    # said once; and there is room again
    writer.finish()
    (tmp_path / "checkpoint-00000002.pt.part").unlink()
    writer.save(2, state_of(2))
    writer.finish()
    assert steps_in(tmp_path) == [2]


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_a_failed_write_surfaces_at_the_next_one_at_the_latest(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000001.pt.part").symlink_to(FULL)
    writer = CheckpointWriter(tmp_path)
    writer.save(1, state_of(1))
    with pytest.raises(OSError, match="No space left"):
        writer.save(2, state_of(2))
    writer.finish()
    assert steps_in(tmp_path) == []


def test_a_folder_that_is_gone_surfaces(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "gone")
    writer.save(1, state_of(1))
    with pytest.raises(FileNotFoundError):
        writer.finish()


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    write_state(path, state_of(1))
    with path.open("rb") as held:
        before = path.read_bytes()
        write_state(path, state_of(2))
        assert held.read() == before
    assert read_state(path)["weights"]["w"].tolist() == [2, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]
