"""Hidden-state distillation: layers of the student learn to give what layers of a teacher in memory give.

For a student that was cut out of its teacher. What a pair of layers gives at the supervised rows is compared after a
learned projection, as each row's mean squared difference over the mean square of the teacher's (so every layer counts
alike, however large its states are). The projections train with the student, are kept in its checkpoints, and are
dropped at the end (Romero et al. 2015, FitNets; Jiao et al. 2020, TinyBERT, sections 3.1 and 3.2).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.attention import decoder_of
from distill.config import HiddenStates
from distill.errors import ModelError

NAME = "hidden_match"
"""Attribute of the student under which its projections live while it trains."""


def paired(config: HiddenStates, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Pairs of layers, from 1: those of the recipe, or every one of the student's with an even choice of the teacher's.

    Raises ModelError for a layer that is not there.
    """
    pairs = config.layers or [
        (layer, max(1, round(layer * teacher_layers / student_layers))) for layer in range(1, student_layers + 1)
    ]
    for own, theirs in pairs:
        if not (1 <= own <= student_layers and 1 <= theirs <= teacher_layers):
            raise ModelError(
                f"hidden.layers pairs ({own}, {theirs}), but the student has layers 1 to {student_layers} and the"
                f" teacher 1 to {teacher_layers}"
            )
    return list(pairs)


class HiddenMatch(nn.Module):
    """The loss between pairs of layers, with a projection for each where widths differ or training moves it."""

    def __init__(self, config: HiddenStates, student: Any, teacher: Any) -> None:
        super().__init__()
        self.config = config
        self.pairs = paired(config, len(decoder_of(student).layers), len(decoder_of(teacher).layers))
        widths = student.config.hidden_size, teacher.config.hidden_size
        generator = torch.Generator().manual_seed(config.seed)
        count = len(self.pairs) * (2 if config.attention else 1)
        self.projections = nn.ModuleList(_projection(*widths, generator) for _ in range(count))
        self.to(student.device)

    def forward(self, own: Sequence[Tensor], theirs: Sequence[Tensor], weights_N: Tensor) -> Tensor:
        """The weighted loss summed over rows, of what `captured` found: layers first, then their attention."""
        total = weights_N.new_zeros((), dtype=torch.float32)
        for number, (student_NH, teacher_NH) in enumerate(zip(own, theirs, strict=True)):
            weight = self.config.weight if number < len(self.pairs) else self.config.attention
            target = teacher_NH.float()
            apart = (self.projections[number](student_NH).float() - target).square().mean(-1)
            size = target.square().mean(-1).clamp_min(1e-8)
            total = total + weight / len(self.pairs) * (weights_N * apart / size).sum()
        return total


def _projection(width: int, target: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(width, target, bias=False)
    with torch.no_grad():
        if width == target:
            layer.weight.copy_(torch.eye(width))
        else:
            layer.weight.copy_(torch.randn(target, width, generator=generator) / width**0.5)
    return layer


@contextmanager
def captured(model: Any, layers: Sequence[int], attention: bool) -> Iterator[list[Tensor]]:
    """What these layers (from 1) give during the block, [B, T, H] each, then what their attention gives."""
    found: dict[int, Tensor] = {}
    hooks = []
    decoder = decoder_of(model).layers
    places = [decoder[layer - 1] for layer in layers]
    places += [decoder[layer - 1].self_attn for layer in layers] if attention else []
    for number, module in enumerate(places):
        hooks.append(module.register_forward_hook(_keep(found, number)))
    result: list[Tensor] = []
    try:
        yield result
        result.extend(found[number] for number in range(len(places)))
    finally:
        for hook in hooks:
            hook.remove()


def _keep(found: dict[int, Tensor], number: int) -> Any:
    def hook(module: Any, given: Any, output: Any) -> None:
        found[number] = output[0] if isinstance(output, tuple) else output

    return hook


@contextmanager
def captured_by(match: HiddenMatch | None, model: Any, teacher: bool = False) -> Iterator[list[Tensor]]:
    """What a student or a teacher gives in the layers that are compared; nothing where none are."""
    if match is None:
        yield []
        return
    with captured(model, [pair[teacher] for pair in match.pairs], bool(match.config.attention)) as found:
        yield found


def attach(config: HiddenStates, student: Any, teacher: Any) -> HiddenMatch:
    """Give the student its projections, as a part of it that trains; `detach` takes them away."""
    match = HiddenMatch(config, student, teacher)
    student.add_module(NAME, match)
    return match


def match_of(student: Any) -> HiddenMatch | None:
    """The student's projections, where it has some."""
    found: HiddenMatch | None = getattr(student, NAME, None)
    return found


def detach(student: Any) -> None:
    """Take the projections away, before the student is saved."""
    if match_of(student) is not None:
        delattr(student, NAME)
