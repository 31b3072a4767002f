"""Several processes as one trainer: who this process is, and the few things it says to the others.

Started by torchrun or `accelerate launch`, every process runs the same command. The plan of a training is the same in
all of them; a process takes its share of each step's packs, and sums go over all. Only the main process writes.
"""

import atexit
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.errors import TrainingError
from distill.processes import launched

BUCKET = 64 << 20
"""Bytes of gradients that go over the network in one piece."""
TIMEOUT = timedelta(hours=2)
"""Longest wait for the others: the main one may be writing a checkpoint or letting the student answer."""


@dataclass(frozen=True)
class World:
    """One process among `size` that train together."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def share(self, packs: Sequence[Any]) -> list[Any]:
        """The packs of a step that are this process's."""
        return list(packs[self.rank :: self.size])

    def rounds(self, packs: Sequence[Any]) -> int:
        """Passes that the busiest process makes over a step's packs."""
        return -(-len(packs) // self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors of one dtype up over all processes, in place, in pieces of some megabytes."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            at = 0
            for tensor in bucket:
                tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
                at += tensor.numel()

    def sums(self, values: Sequence[float]) -> list[float]:
        """Numbers added up over all processes, in float64."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=_own_device())
        dist.all_reduce(tensor)
        return list(tensor.tolist())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.sums([float(flag)])[0] > 0

    def from_main(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every process's value, in all of them, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def agree(self, what: str, value: str) -> None:
        """Refuse to go on where processes hold different things.

        Raises TrainingError in all of them.
        """
        expected = self.from_main(value)
        if self.any(value != expected):
            raise TrainingError(
                f"the {self.size} processes have different {what}; start all of them from one recipe and one run store"
            )


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def local_device(device: str) -> str:
    """The device of this process on its machine: `cuda` becomes `cuda:LOCAL_RANK`."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


@contextmanager
def joined_world(device: str) -> Iterator[World]:
    """Join the other processes for the block; alone where there are none.

    They stay joined until they end: a second meeting would find what the first one left in the launcher's store.
    """
    if launched().size == 1:
        yield World()
        return
    if not dist.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
        atexit.register(_leave)
    yield World(dist.get_rank(), dist.get_world_size())
    dist.barrier()  # one that leaves early would cut the others' last words off


def _leave() -> None:
    """End all groups of processes; DeepSpeed, where it took part, has to forget its own, or it would use them again."""
    zero = sys.modules.get("deepspeed.comm")
    if zero is not None and zero.is_initialized():
        zero.destroy_process_group()
    else:
        dist.destroy_process_group()


def _own_device() -> str:
    return f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"
