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


def run(folder: Path, variant: str, rows: list[list[int]], every: bool, past: Any = None) -> tuple[Any, Any]:
    """Logits [batch, kept, vocabulary] of padded rows in plain onnxruntime, and the caches that come out."""
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
    cached = 0 if past is None else next(iter(past.values())).shape[2]
    fed = {
        "input_ids": np.array([row + [0] * (longest - len(row)) for row in rows], np.int64),
        "attention_mask": np.array([[1] * (cached + len(row)) + [0] * (longest - len(row)) for row in rows], np.int64),
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
