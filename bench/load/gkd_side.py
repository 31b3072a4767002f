"""TRL's GKDTrainer without generation, step by step; runs in the peer's own environment.

Trains the student of a folder to give its teacher's distribution on the tokenized documents beside them, batches padded
on the right, fp32 weights under bf16 autocast; the teacher is in bf16.
"""

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from steps import Clock, keep_freed_memory, loaded_mb, memory_mb, say

keep_freed_memory()  # before anything large is allocated

from datasets import Dataset  # noqa: E402  see above
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402
from trl_side import EnoughError, Turns, common, counted  # noqa: E402


class Counted(GKDTrainer):
    """TRL's trainer, which also counts what each step trains on."""

    counts: dict[str, int]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """One micro-batch."""
        for name, count in counted(inputs).items():
            self.counts[name] = self.counts.get(name, 0) + count
        return super().training_step(model, inputs, num_items_in_batch)


class Padded:
    """Documents side by side, padded on the right, labels on completions only."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch."""
        longest = max(len(one["input_ids"]) for one in examples)
        ids, mask, labels = [], [], []
        for one in examples:
            length, supervised = len(one["input_ids"]), sum(one["completion_mask"])
            fill = longest - length
            ids.append(one["input_ids"] + [self.pad] * fill)
            mask.append([1] * length + [0] * fill)
            labels.append([-100] * (length - supervised) + one["input_ids"][-supervised:] + [-100] * fill)
        tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: torch.tensor(values) for name, values in tensors.items()}


def configuration(given: argparse.Namespace, folder: str) -> GKDConfig:
    """TRL's configuration: forward KL at temperature 1 on the given completions."""
    return GKDConfig(
        **common(folder, given.precision, given.lr),
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=max(1, given.documents // 4),
        max_length=1024,
        train_sampling_strategy=given.order,
    )


def main() -> None:
    """Load both models, make the trainer, step while asked to."""
    given = arguments()
    torch.set_num_threads(given.threads)
    student = AutoModelForCausalLM.from_pretrained(given.folder / "model", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(given.folder / "teacher", dtype=torch.bfloat16)
    for weight in teacher.parameters():
        weight.data = weight.data.clone()
    loaded = loaded_mb(student)
    documents = [json.loads(line) for line in (given.folder / "train.jsonl").read_text().splitlines()]
    documents = [{**one, "length": len(one["input_ids"])} for one in documents]
    tokenizer = AutoTokenizer.from_pretrained(given.folder / "model")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Counted(
            model=student,
            teacher_model=teacher,
            args=configuration(given, folder),
            data_collator=Padded(tokenizer.pad_token_id or 0),
            train_dataset=Dataset.from_list(documents),
            processing_class=tokenizer,
        )
        turns = Turns(Clock(student.config.vocab_size))
        turns.trainer = trainer
        trainer.add_callback(turns)
        say(ready=True)
        with contextlib.suppress(EnoughError):
            trainer.train()
        say(loaded_mb=loaded, peak_mb=memory_mb("VmHWM"))


def arguments() -> argparse.Namespace:
    """What the benchmark gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="holds model/, teacher/ and train.jsonl")
    parser.add_argument("--precision", choices=("bf16", "fp32"), required=True)
    parser.add_argument("--order", choices=("sequential", "group_by_length"), required=True)
    parser.add_argument("--documents", type=int, required=True, help="of a step")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
