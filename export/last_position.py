"""Let a graph predict after the last token that it is fed alone, as a text that is written needs.

A head over the whole vocabulary takes a fifth of a small model's prefill, and its logits a gigabyte for a long prompt.
Nothing behind the last attention looks at other positions, so rows are chosen there. The place of the last token comes
from the mask: rows of a batch that are padded on the right end where their text does, not where the longest one does.
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
    added, stream = _residual(attention)
    tape = onnx_ir.tape.Tape()
    places = _places(tape, graph)
    for node, index in ((attention.outputs[0].uses()[0].node, 0), (added, stream)):
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

    Of T new tokens behind a cache, S with it, the last real one of a row with n in its mask is n - 1 - (S - T).
    """
    ids, mask = (
        next(value for value in graph.inputs if value.name == name) for name in ("input_ids", "attention_mask")
    )
    every = _initializer(graph, EVERY_POSITION, [0])
    zero, one, minus_one = (tape.op("Constant", [], {"value_ints": [number]}) for number in (0, 1, -1))
    new, whole = (tape.op("Shape", [of], {"start": 1, "end": 2}) for of in (ids, mask))
    wanted = tape.op("Mul", [new, every])
    before_last = tape.op("Sub", [tape.op("Sub", [new, whole]), one])
    last = tape.op("Add", [tape.op("ReduceSum", [mask, one], {"keepdims": 1}), before_last])
    # a row that has ended asks for a place before the first of its new tokens, and is not looked at
    last = tape.op("Max", [last, tape.op("Sub", [wanted, one]), zero])
    first = tape.op("Squeeze", [tape.op("Sub", [one, tape.op("Max", [wanted, one])])])
    single = tape.op("Squeeze", [one])
    back = tape.op("Range", [first, single, single])
    return tape.op("Unsqueeze", [tape.op("Max", [tape.op("Add", [last, back]), zero]), minus_one])


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
