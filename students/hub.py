"""Publishing a trained checkpoint on the Hugging Face hub: the sealed folder with its card, on request only."""

from distill import hub
from distill.errors import RunError
from distill.runs import SealedRun, open_sealed

from .card import CARD_FILE

FOLDER = "model"
REPLACED = [
    "model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
    "adapter_config.json", "adapter_model.*", "generation_config.json", "chat_template.*", "tokenizer*",
    "added_tokens.json", "special_tokens_map.json", "vocab.*", "merges.txt",
]  # fmt: skip
"""What a loader would take from an earlier model beside the files of this one."""


def push(run: SealedRun, repo: str, private: bool = False) -> str:
    """Upload the checkpoint of a train run in place of any earlier one, and return its address.

    Raises RunError if the run has no checkpoint with a card or other bytes than were sealed, DataError if the hub
    refuses.
    """
    folder = run.path(FOLDER)
    if not (folder / CARD_FILE).is_file():
        raise RunError(
            f"{folder / CARD_FILE}: this run was made without a model card; delete {run.folder} and run the same"
            " command again, or upload the folder yourself"
        )
    document = open_sealed(run.folder).document
    return hub.upload(
        folder, repo, "model", f"distill train {document['name']} {document['identity']}", REPLACED, private
    )
