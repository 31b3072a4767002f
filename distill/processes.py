"""Which of several processes this one is, where torchrun or `accelerate launch` started more than one.

Read from the environment, which is all that the front door needs: the main process runs every stage and says what
happened; the others take part in training and wait for the rest. accelerate may also have been told to use DeepSpeed.
"""

import os
from dataclasses import dataclass

from distill.errors import TrainingError


@dataclass(frozen=True)
class Processes:
    """One process among `size`, by its number."""

    rank: int
    size: int

    @property
    def main(self) -> bool:
        """Whether this is the one that runs every stage."""
        return self.rank == 0


def launched() -> Processes:
    """What the launcher said."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def shared_by(parallel: str) -> str:
    """How processes share a training: as the recipe's `student.parallel` says, or as accelerate was told.

    Raises TrainingError where the two contradict each other, and for what DeepSpeed would be told beyond its stage.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() not in ("1", "true", "yes"):
        return parallel
    told = f"zero{_told('ZERO_STAGE') or 2}"  # accelerate's own default
    if told not in ("zero1", "zero2", "zero3"):
        raise TrainingError(f"accelerate was told ZeRO stage {told[4:]}; launch with --zero_stage 1, 2 or 3")
    for name in ("OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE"):
        if device := _told(name):
            raise TrainingError(
                f"accelerate was told --{name.lower()} {device}, but masters and optimizer stay on the training's own"
                " devices; launch without it, and with more processes or --zero_stage 3 where memory is short"
            )
    if file := _told("CONFIG_FILE"):
        raise TrainingError(
            f"accelerate was told to take DeepSpeed's settings from {file}, but the recipe says what trains; launch"
            " with --zero_stage alone"
        )
    if parallel not in ("auto", told):
        raise TrainingError(
            f"accelerate was told to use DeepSpeed ({told}), but student.parallel is {parallel}; launch without"
            " --use_deepspeed, or set student.parallel=auto"
        )
    return told


def _told(name: str) -> str:
    """What accelerate's launcher passed on for DeepSpeed under a name; nothing for `none`."""
    said = os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "")
    return "" if said.lower() == "none" else said
