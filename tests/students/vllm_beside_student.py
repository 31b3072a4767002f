"""Let vLLM write for a student whose weights change; prints what it wrote beside transformers, as JSON.

    python vllm_beside_student.py MODEL

To be run in an environment with vLLM. It answers greedily: with the weights it was given, with changed weights that it
was not given yet, and with them; for a tied head, an untied one, and one with adapters.
"""

import json
import sys
from typing import Any

from distill.config import Lora, WriterOptions
from distill.engines.transformers import generate_ids
from distill.models import find_model, load_model
from distill.students.writers import Batch, VllmWriter

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12], [20] * 40, [31, 32, 33, 34]]
MOST, CONTEXT = 16, 128
OPTIONS = WriterOptions(enforce_eager=True, kv_cache_gb=0.05, max_num_seqs=8)


def student(folder: str, kind: str) -> Any:
    """A model with weights so large that its texts differ."""
    import torch

    model = load_model(find_model(folder))
    if kind == "untied":
        values = model.config.to_dict() | {"tie_word_embeddings": False}
        model = type(model)(type(model.config)(**values)).eval()
    if kind == "adapted":
        from distill.students.adapters import with_adapters

        model = with_adapters(model, Lora(rank=4, alpha=16), 0).eval()
    torch.manual_seed(0)
    disturb(model, 0.15)
    return model


def disturb(model: Any, size: float) -> None:
    """What training does to every weight that trains, only more of it."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


def written(writer: VllmWriter, seed: int = 0) -> list[list[int]]:
    """In two batches, which come back as they were given."""
    one, two = writer.write([Batch(PROMPTS[:1], MOST, seed), Batch(PROMPTS[1:], MOST, seed + 9)])
    return [*one, *two]


def follows(folder: str, kind: str) -> dict[str, Any]:
    """Whether vLLM's greedy texts are those of the weights it has been given."""
    model = student(folder, kind)
    writer = VllmWriter(0.0, OPTIONS, CONTEXT, 512)
    writer.sync(model)
    old = generate_ids(model, PROMPTS, MOST)
    first = written(writer)
    disturb(model, 0.1)
    new, unsynced = generate_ids(model, PROMPTS, MOST), written(writer)
    writer.sync(model)
    synced = written(writer)
    writer.close()
    return {
        "differ": sum(one != two for one, two in zip(old, new)),
        "first_is_old": first == old,
        "unsynced_is_old": unsynced == old,
        "synced_is_new": synced == new,
    }


def draws(folder: str) -> dict[str, Any]:
    """Drawn texts: equal for equal seeds, others for others, and of known tokens alone."""
    model = student(folder, "tied")
    writer = VllmWriter(1.0, OPTIONS, CONTEXT, 100)
    writer.sync(model)
    one, again, other = written(writer, 1), written(writer, 1), written(writer, 2)
    writer.close()
    return {"again": one == again, "other": one == other, "highest": max(map(max, one))}


if __name__ == "__main__":
    found: dict[str, Any] = {kind: follows(sys.argv[1], kind) for kind in ("tied", "untied", "adapted")}
    print(json.dumps(found | {"draws": draws(sys.argv[1])}))
