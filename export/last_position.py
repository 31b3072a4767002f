"""Let a graph predict after the last token that it is fed alone, as a text that is written needs.

A head over the whole vocabulary takes a fifth of a small model's prefill, and its logits a gigabyte for a long prompt.
Nothing behind the last attention looks at other positions, so rows are chosen there. The place of the last token comes
from the mask: rows of a batch that are padded on the right end where their text does, not where the longest one does
(attention itself takes no padding on the left).
Comparisons need every position: they load the same file with the constant `EVERY_POSITION` set to 1.
"""

import itertools
from typing import Any

from distill.errors import ExportError
from distill.onnx_decoding import EVERY_POSITION

KEPT = "kept_length"
"""What the graph calls the number of positions that are kept."""
NORMALIZED = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
"""Operators that add what a block wrote to the residual stream."""


def keep_last_position(graph: Any) -> None:
    """Make a built graph of `onnx_ir` give logits [batch, 1, vocabulary]; the runtimes read that 1 from its shape.

    Raises ExportError where the last attention does not lead into the residual stream.
    """
    import onnx_ir

    attention = [node for node in graph if node.op_type == "GroupQueryAttention"][-1]
    readers = attention.outputs[0].uses()[0], _residual(attention)
    tape = onnx_ir.tape.Tape()
    places = _places(tape, graph)
    for node, index in readers:
        whole = node.inputs[index]
        kept = tape.op("GatherND", [whole, places], {"batch_dims": 1})
        kept.type = whole.type
        node.replace_input_with(index, kept)
    graph.insert_after(attention, tape.nodes)
    for value in _behind(tape.nodes[-2:]):
        if value.shape is not None and len(value.shape) == 3:
            length = 1 if value.name == "logits" else KEPT
            value.shape = onnx_ir.Shape([value.shape[0], length, value.shape[2]])


def _residual(attention: Any) -> tuple[Any, int]:
    """The node that adds the attention's output to the residual stream, and which of its inputs is the stream."""
    value = attention.outputs[0]
    while len(value.uses()) == 1:
        node, index = value.uses()[0]
        if node.op_type in NORMALIZED and index < 2:
            return node, 1 - index
        value = node.outputs[0]
    raise ExportError(f"{attention.name}: what it writes is not added to the residual stream, as far as {value.name}")


def _places(tape: Any, graph: Any) -> Any:
    """The positions to keep of each row; int64 [batch, kept, 1].

    Of T new tokens, the last real one of a row with n in its mask is n - 1 - (S - T), where S is the most that any row
    has: a mask may be wider than its texts.
    """
    ids, mask = (
        next(value for value in graph.inputs if value.name == name) for name in ("input_ids", "attention_mask")
    )
    every = _initializer(graph, EVERY_POSITION, [0])
    zero, one, last_axis = (tape.op("Constant", [], {"value_ints": [number]}) for number in (0, 1, -1))
    new = tape.op("Shape", [ids], {"start": 1, "end": 2})
    real = tape.op("ReduceSum", [mask, one], {"keepdims": 1})
    most = tape.op("Max", [new, tape.op("ReduceMax", [real, zero], {"keepdims": 0})])
    all_or_none = tape.op("Mul", [new, every])
    place = tape.op("Sub", [tape.op("Add", [real, tape.op("Sub", [new, most])]), one])
    # rows of a batch are not as far as the longest: what they are fed is one token, whose place is the first
    place = tape.op("Max", [place, tape.op("Sub", [all_or_none, one]), zero])
    first = tape.op("Squeeze", [tape.op("Sub", [one, tape.op("Max", [all_or_none, one])])])
    single = tape.op("Squeeze", [one])
    back = tape.op("Range", [first, single, single])
    return tape.op("Unsqueeze", [tape.op("Add", [place, back]), last_axis])


def _initializer(graph: Any, name: str, numbers: list[int]) -> Any:
    import numpy as np
    import onnx_ir

    tensor = onnx_ir.tensor(np.array(numbers, np.int64), name=name)
    value = onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _behind(nodes: list[Any]) -> list[Any]:
    """All values that are computed from what the nodes give."""
    found: dict[int, Any] = {}
    waiting = list(itertools.chain.from_iterable(node.outputs for node in nodes))
    while waiting:
        value = waiting.pop()
        if id(value) not in found:
            found[id(value)] = value
            waiting += [output for use in value.uses() for output in use.node.outputs]
    return list(found.values())
