"""What a user of an artifact should not take for granted: for its card and for its bill of materials."""

from collections.abc import Iterator

from .manifest import Draft


def known_limits(draft: Draft) -> Iterator[str]:
    """One plain sentence each."""
    if not draft.evaluation:
        yield "No variant was evaluated on a task."
    for gate in draft.gates:
        if gate.status != "passed":
            of = f" of {gate.variant}" if gate.variant else ""
            ended = "failed" if gate.status == "failed" else "was not run"
            yield f"Gate {gate.name}{of} {ended}{f': {gate.detail}' if gate.detail else ''}."
    if draft.evaluation:
        sets = ", ".join(sorted({one.set for one in draft.evaluation}))
        yield f"Accuracies are on {sets} alone; nothing here says how it does on anything else."
    if not draft.golden:
        yield "It has no golden prompts, so `distill verify` cannot run it against expected tokens."
    if draft.origins.data is None:
        yield "What trained it is not known here: it was exported as it was given."
    yield "Quantized variants round weights and activations: their texts differ from the student's where it hesitates."
    yield "It was not tested for safety, and takes over what its base and its teachers get wrong."
