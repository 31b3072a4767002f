"""What the export stage compares: the student's own answers where it has any, whole prompts elsewhere."""

from pathlib import Path

from distill.export.export import DOCUMENT_TOKENS, document_of, remove_unfinished


def test_only_the_positions_that_predict_an_answer_are_compared() -> None:
    document = document_of([5, 6, 7], [8, 9, 2])
    assert document.ids == [5, 6, 7, 8, 9, 2]
    # position 2 predicts 8, position 3 predicts 9, position 4 predicts the end token; nothing follows the end
    assert list(document.compared) == [2, 3, 4]
    assert [document.ids[position + 1] for position in document.compared] == [8, 9, 2]


def test_a_prompt_without_an_answer_is_compared_everywhere() -> None:
    assert list(document_of([5, 6, 7], []).compared) == [0, 1, 2]


def test_a_long_answer_is_cut_and_still_compared_up_to_the_cut() -> None:
    document = document_of([1] * 10, [3] * (2 * DOCUMENT_TOKENS))
    assert len(document.ids) == DOCUMENT_TOKENS
    assert list(document.compared) == list(range(9, DOCUMENT_TOKENS - 1))


def test_what_a_killed_attempt_left_half_written_never_reaches_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "old.part").mkdir()
    (tmp_path / "old.part" / "model.onnx").write_bytes(b"half")
    (tmp_path / "manifest.json.part").write_bytes(b"{")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
