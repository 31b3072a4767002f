"""The export stage leaves no half-written file to ship."""

from pathlib import Path

from distill.export.export import remove_unfinished


def test_what_a_killed_attempt_left_half_written_never_reaches_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "old.part").mkdir()
    (tmp_path / "old.part" / "model.onnx").write_bytes(b"half")
    (tmp_path / "manifest.json.part").write_bytes(b"{")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
