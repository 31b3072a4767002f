"""Our whole generate stage: prompts from a file, ledger and journal as shipped, every answer judged by `number`."""

import json
from pathlib import Path
from typing import Any

from measure import SAMPLING, arguments, measured, question
from server import ANSWER

import distill.api
from distill.config import recipe_from


def recipe_for(url: str, concurrency: str, prompts: Path) -> Any:
    """A recipe whose verdicts are made beside generation, since `until` waits for them; the first one is right."""
    teacher = {
        "engine": "openai",
        "model": "bench",
        "probe": False,
        "endpoint": {"base_url": url, "concurrency": concurrency if concurrency == "auto" else int(concurrency)},
        "sampling": {"temperature": SAMPLING["temperature"], "top_p": SAMPLING["top_p"], "max_new_tokens": 1024},
        "until": {"correct": 1, "tries": 2},
    }
    source = {"name": "shop", "file": str(prompts), "verifier": "number"}
    return recipe_from({"name": "throughput", "prompts": [source], "teacher": teacher})


def write_prompts(path: Path, count: int) -> None:
    """A file of questions with their answer."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"question": question(number), "answer": ANSWER}) + "\n")


if __name__ == "__main__":
    given = arguments(__doc__, "--folder")
    folder = Path(given.folder)
    write_prompts(folder / "prompts.jsonl", given.requests)
    recipe = recipe_for(given.url, given.concurrency, folder / "prompts.jsonl")
    distill.api.run(recipe, "prompts", runs=folder / "runs", quiet=True)
    with measured(given.requests):
        distill.api.run(recipe, "generate", runs=folder / "runs", quiet=True)
