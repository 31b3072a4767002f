"""What variants are compared on: the student's own answers where it has any, and never what GPTQ is calibrated on."""

import pytest

from distill.errors import ExportError
from distill.export.texts import DOCUMENT_TOKENS, comparable, text_of, until


def test_only_the_positions_that_predict_an_answer_are_compared() -> None:
    text = text_of([5, 6, 7], [8, 9, 2])
    assert text.ids == [5, 6, 7, 8, 9, 2]
    # position 2 predicts 8, position 3 predicts 9, position 4 predicts the end token; nothing follows the end
    assert list(text.compared) == [2, 3, 4]
    assert text.following == [8, 9, 2]


def test_a_prompt_without_an_answer_is_compared_everywhere() -> None:
    text = text_of([5, 6, 7], [])
    assert list(text.compared) == [0, 1, 2] and text.following == [6, 7]


def test_a_long_answer_is_cut_and_still_compared_up_to_the_cut() -> None:
    text = text_of([1] * 10, [3] * (2 * DOCUMENT_TOKENS))
    assert len(text.ids) == DOCUMENT_TOKENS
    assert list(text.compared) == list(range(9, DOCUMENT_TOKENS - 1))


def test_texts_are_taken_until_there_are_enough_positions() -> None:
    texts = [text_of([1, 2], [3] * 10) for _ in range(5)]
    assert len(list(until(texts, 25))) == 3 and len(list(until(texts, 1000))) == 5


def test_what_cannot_be_compared_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    long, short = [1] * DOCUMENT_TOKENS, [1, 2]
    found = comparable([(long, [3]), (short, []), (short, [3, 4])])
    assert [text.following for text in found] == [[3, 4]]
    assert "2 of 3 held-out texts are not compared" in capsys.readouterr().err
    assert [len(text.compared) for text in comparable([(short, []), (short, [])])] == [2, 2]
    with pytest.raises(ExportError, match=r"every held-out prompt has 1,024 tokens or more"):
        comparable([(long, [3])])
