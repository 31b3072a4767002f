"""A graph gives logits after the last token that it is fed, and the same ones as it gives after every token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.artifact import VARIANT_FILES
from distill.errors import ExportError
from distill.export.last_position import keep_last_position
from distill.export.schemes import VARIANTS
from distill.onnx_decoding import EVERY_POSITION, read_shape

FAMILIES = ("llama", "qwen2", "qwen3")
LENGTHS = (9, 4, 1)
"""Tokens of a batch's rows, which are padded on the right."""


def run(
    folder: Path, variant: str, rows: list[list[int]], every: bool, past: Any = None, cached: tuple[int, ...] = ()
) -> tuple[Any, Any]:
    """Logits [batch, kept, vocabulary] of padded rows in plain onnxruntime, and the caches that come out.

    `cached` are the tokens of each row that are in the cache: all that it holds, by default. Where none are, the cache
    is room for them, and the mask as wide as it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    switch = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([int(every)], np.int64))
    if every:
        options.add_initializer(EVERY_POSITION, switch)
    session = onnxruntime.InferenceSession(folder / VARIANT_FILES[variant], options)
    longest = max(map(len, rows))
    shape = read_shape(folder)
    half = "float16" in session.get_inputs()[2].type
    length = 0 if past is None else next(iter(past.values())).shape[2]
    real = [before + len(row) for before, row in zip(cached or [length] * len(rows), rows, strict=True)]
    mask = np.arange(length + (longest if not cached or any(cached) else 0))[None] < np.array(real)[:, None]
    fed = {
        "input_ids": np.array([row + [0] * (longest - len(row)) for row in rows], np.int64),
        "attention_mask": mask.astype(np.int64),
    }
    empty = np.zeros((len(rows), shape.heads, 0, shape.head_size), np.float16 if half else np.float32)
    names = [value.name for value in session.get_inputs() if value.name.startswith("past")]
    fed |= {name: empty if past is None else past[name] for name in names}
    logits, *present = session.run(None, fed)
    kept = [value.name.replace("present", "past_key_values") for value in session.get_outputs()[1:]]
    return logits, dict(zip(kept, present, strict=True))


def rows_of(lengths: tuple[int, ...]) -> list[list[int]]:
    return [[int(token) for token in np.random.default_rng(n).integers(3, 500, n)] for n in lengths]


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_rows_last_logits_are_those_after_its_own_last_token(
    exported: Callable[..., Path], family: str, variant: str
) -> None:
    folder, rows = exported(family, variant), rows_of(LENGTHS)
    whole, _ = run(folder, variant, rows, every=True)
    last, _ = run(folder, variant, rows, every=False)
    assert whole.shape[:2] == (3, 9) and last.shape[:2] == (3, 1)
    for row, length in enumerate(LENGTHS):
        expected = whole[row, length - 1].astype(np.float32)
        assert last[row, 0].astype(np.float32) == pytest.approx(expected, abs=2e-2 if "16" in variant else 1e-4)
        others = np.delete(whole[row, :length], length - 1, 0)
        assert all(np.abs(other - expected).max() > 0.1 for other in others)  # or any place would do


def test_behind_a_cache_the_last_of_the_new_tokens_counts(exported: Callable[..., Path]) -> None:
    (text,) = rows_of((12,))
    whole, _ = run(exported(), "fp32", [text], every=True)
    first, past = run(exported(), "fp32", [text[:7]], every=False)
    second, past = run(exported(), "fp32", [text[7:11]], every=False, past=past)
    third, _ = run(exported(), "fp32", [text[11:]], every=False, past=past)
    for found, place in ((first, 6), (second, 10), (third, 11)):
        assert found.shape[1] == 1 and found[0, 0] == pytest.approx(whole[0, place], abs=1e-4)


def test_rows_of_a_batch_that_are_not_equally_far_each_have_their_own_token(exported: Callable[..., Path]) -> None:
    folder, texts = exported(), rows_of((8, 8))
    wholes = [run(folder, "fp32", [text], every=True)[0][0] for text in texts]
    alone = [run(folder, "fp32", [text[:length]], every=False)[1] for text, length in zip(texts, (7, 3), strict=True)]
    past = {
        name: np.concatenate([np.pad(of[name], [(0, 0), (0, 0), (0, 7 - of[name].shape[2]), (0, 0)]) for of in alone])
        for name in alone[0]
    }
    found, _ = run(folder, "fp32", [[texts[0][7]], [texts[1][3]]], every=False, past=past, cached=(7, 3))
    assert found.shape[:2] == (2, 1)
    assert found[0, 0] == pytest.approx(wholes[0][7], abs=1e-4)
    assert found[1, 0] == pytest.approx(wholes[1][3], abs=1e-4)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"tied": False}, {"attention_bias": True}], ids=str)
def test_other_shapes_of_a_model_keep_the_last_position_too(
    exported: Callable[..., Path], changes: dict[str, Any]
) -> None:
    """A mask may also be wider than all texts, as runtimes make them that record a graph for a cache of one size."""
    folder, rows, shape = exported(**changes), rows_of(LENGTHS), read_shape(exported(**changes))
    whole, present = run(folder, "fp32", rows, every=True)
    room = {name: np.zeros((1, shape.heads, 14, shape.head_size), np.float32) for name in present}
    last, _ = run(folder, "fp32", rows, every=False)
    for row, text in enumerate(rows):
        expected = pytest.approx(whole[row, len(text) - 1], abs=1e-4)
        assert last[row, 0] == expected
        assert run(folder, "fp32", [text], every=False, past=room, cached=(0,))[0][0, 0] == expected


def test_runtimes_read_from_the_shape_that_one_position_is_kept(exported: Callable[..., Path]) -> None:
    import onnx

    outputs = onnx.load(exported() / VARIANT_FILES["fp32"], load_external_data=False).graph.output
    logits = next(value for value in outputs if value.name == "logits")
    assert logits.type.tensor_type.shape.dim[1].dim_value == 1


def test_a_graph_whose_attention_leads_nowhere_is_refused(exported: Callable[..., Path]) -> None:
    import onnx_ir

    graph = onnx_ir.load(exported(variant="fp32") / VARIANT_FILES["fp32"]).graph
    node = next(node for node in reversed(list(graph)) if node.op_type.startswith("Skip") and "post_att" in node.name)
    node.op_type = "Add"
    with pytest.raises(ExportError, match="not added to the residual stream"):
        keep_last_position(graph)
