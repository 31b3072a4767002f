"""Which of several processes this one is, where torchrun or `accelerate launch` started more than one.

Read from the environment, which is all that the front door needs: the main process runs every stage and says what
happened; the others take part in training and wait for the rest.
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
    """What the launcher said.

    Raises TrainingError for DeepSpeed, which accelerate would hand the training to.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true", "yes"):
        raise TrainingError(
            "accelerate was told to use DeepSpeed, which is not supported: it would replace the loop that keeps resumes"
            " exact; launch without it and set student.parallel=fsdp, which shards weights and optimizer as ZeRO-3 does"
        )
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
