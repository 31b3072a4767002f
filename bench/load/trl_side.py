"""TRL's SFTTrainer, step by step, in one setting; runs in the peer's own environment.

Trains the model of a folder on the tokenized documents beside it, on completions only. The setting (JSON) says how
documents are laid out, the attention and the loss; the precision is `bf16` (autocast over fp32 weights) or `fp32`. With
`--leak` nothing is trained: it says what the loss of a document is alone, and behind another one in a micro-batch.
"""

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from steps import Clock, asked, keep_freed_memory, loaded_mb, memory_mb, say

keep_freed_memory()  # before anything large is allocated

from datasets import Dataset  # noqa: E402  see above
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402


class Counted(SFTTrainer):
    """TRL's trainer, which also counts what each step trains on.

    `full_logits` takes the loss of transformers' Trainer in place of TRL's: all logits at once, every product in the
    dtype of autocast.
    """

    full_logits = False
    counts: dict[str, int]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """One micro-batch."""
        for name, count in counted(inputs).items():
            self.counts[name] = self.counts.get(name, 0) + count
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *given: Any, **named: Any) -> Any:
        """The loss of one micro-batch."""
        if not self.full_logits:
            return super().compute_loss(model, inputs, *given, **named)
        return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, *given, **named)


def counted(inputs: dict[str, Any]) -> dict[str, int]:
    """Tokens, cells of the forward pass (padding included), supervised rows, the sum of squared sequence lengths."""
    lengths = inputs["attention_mask"].sum(1) if "attention_mask" in inputs else inputs["cu_seq_lens_q"].diff()
    return {
        "tokens": int(lengths.sum()),
        "cells": inputs["input_ids"].numel(),
        "supervised": int((inputs["labels"][:, 1:] != -100).sum()),
        "squares": int((lengths.long() ** 2).sum()),
    }


class EnoughError(Exception):
    """No more steps are wanted."""


class Turns(TrainerCallback):
    """Runs a step when it is asked for, and says what it took."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the turn."""
        what = asked()
        if not what:
            raise EnoughError
        self.trainer.counts = {}
        self.clock.start(what)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The optimizer has stepped."""
        self.found = self.clock.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """The step's loss is known."""
        if "loss" in logs:
            say(loss=logs["loss"], **self.found, **self.trainer.counts)


def common(folder: str, precision: str, lr: float) -> dict[str, Any]:
    """What every trainer of TRL is told: one learning rate, AdamW, clipping, no checkpoints, no reports."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": precision == "bf16",
        "gradient_checkpointing": False,
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "num_train_epochs": 1000,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


def configuration(setting: dict[str, Any], precision: str, lr: float, folder: str) -> SFTConfig:
    """TRL's configuration for a setting."""
    packed = setting["layout"] in ("bfd", "wrapped")
    padding_free = setting["layout"] == "padding_free"
    return SFTConfig(
        **common(folder, precision, lr),
        per_device_train_batch_size=setting["batch"],
        gradient_accumulation_steps=setting["accumulate"],
        max_length=None if padding_free else setting["max_length"],
        packing=packed,
        packing_strategy=setting["layout"] if packed else "bfd",
        padding_free=padding_free,
        completion_only_loss=True,
        train_sampling_strategy=setting["order"],
        torch_compile=setting["compile"],
    )


def train(given: argparse.Namespace, trainer: Counted, clock: Clock, loaded: float) -> None:
    """Train while asked to; say what it took."""
    turns = Turns(clock)
    turns.trainer = trainer
    trainer.add_callback(turns)
    say(ready=True)
    with contextlib.suppress(EnoughError):
        trainer.train()
    peak = memory_mb("VmHWM")
    if given.save:
        trainer.accelerator.unwrap_model(trainer.model).float().save_pretrained(given.save)
    say(loaded_mb=loaded, peak_mb=peak)


@torch.no_grad()
def leak(trainer: Counted, documents: list[dict[str, Any]]) -> None:
    """Say the mean loss of the second of two documents, alone and behind the first in a micro-batch of the trainer."""
    trainer.model.eval()
    rows = sum(documents[1]["completion_mask"])
    alone = {"input_ids": documents[1]["input_ids"]}
    together = [trainer.train_dataset[number] for number in range(len(trainer.train_dataset))]
    losses = []
    for examples in ([alone], together):
        inputs = trainer.data_collator(examples)
        found = trainer.model(**{**inputs, "use_cache": False, "fused_lm_head": True})
        losses.append(-float(found.log_probs[0, -rows:].mean()))
    say(alone=losses[0], together=losses[1])


def main() -> None:
    """Load the model, make the trainer, do what is asked."""
    given = arguments()
    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(
        given.folder / "model", dtype=torch.float32, attn_implementation=given.setting["attention"]
    )
    loaded = loaded_mb(model)
    documents = [json.loads(line) for line in (given.folder / "train.jsonl").read_text().splitlines()]
    if given.leak:
        documents = sorted(documents[:2], key=lambda document: -len(document["input_ids"]))  # as `bfd` lays them
    with tempfile.TemporaryDirectory() as folder:
        trainer = Counted(
            model=model,
            args=configuration(given.setting, given.precision, given.lr, folder),
            train_dataset=Dataset.from_list(documents),
            processing_class=AutoTokenizer.from_pretrained(given.folder / "model"),
        )
        trainer.full_logits = given.setting["loss"] == "full"
        if given.leak:
            leak(trainer, documents)
        else:
            train(given, trainer, Clock(model.config.vocab_size), loaded)


def arguments() -> argparse.Namespace:
    """What the benchmark gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="holds model/ and train.jsonl")
    parser.add_argument("--setting", type=json.loads, required=True)
    parser.add_argument("--precision", choices=("bf16", "fp32"), required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--save", type=Path, help="where to save the fp32 weights at the end")
    parser.add_argument("--leak", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
