"""Publishing the data set of a select run on the Hugging Face hub: the sealed folder as it is, on request only."""

from distill import hub
from distill.errors import MissingExtraError, RunError
from distill.runs import SealedRun, open_sealed

from .training_set import MISSING, can_write

FOLDER = "dataset"


def check_push(repo: str) -> None:
    """Refuse, before any work is done, what cannot be pushed from here.

    Raises what `distill.hub.check_push` does, and MissingExtraError where no data set can be written.
    """
    hub.check_push(repo)
    if not can_write():
        raise MissingExtraError("pyarrow", "train")


def push(run: SealedRun, repo: str, private: bool = False) -> str:
    """Upload the data set of a select run in place of any earlier one, and return its address.

    Raises RunError if the run has no data set or other bytes than were sealed, DataError if the hub refuses.
    """
    folder = run.path(FOLDER)
    if not folder.is_dir():
        raise RunError(
            f"{folder}: this run was made without it ({MISSING}); install it, delete {run.folder} and run the same"
            " command again"
        )
    document = open_sealed(run.folder).document
    message = f"distill select {document['name']} {document['identity']}"
    # an earlier set may have had more files
    return hub.upload(folder, repo, "dataset", message, ["data/*.parquet"], private)
