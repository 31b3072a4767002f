"""Publishing the data set of a select run on the Hugging Face hub: the sealed folder as it is, on request only.

The token comes from HF_TOKEN and is never written or shown. Where it lies on the hub, and whether it is private, is no
part of any identity.
"""

import os
from typing import Any

from distill.errors import DataError, MissingExtraError, RecipeError, RunError
from distill.runs import SealedRun

from .training_set import MISSING, can_write

TOKEN = "HF_TOKEN"  # noqa: S105  # the name of a variable, not its value
FOLDER = "dataset"


def check_push(repo: str) -> None:
    """Refuse, before any work is done, what cannot be pushed from here.

    Raises RecipeError for a name that is none, DataError without a token or where the hub may not be asked,
    MissingExtraError without the libraries.
    """
    _library()
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"--push-to-hub {repo!r}: write it as USER/NAME, such as ada/gsm8k-r1 ({error})") from error
    if repo.count("/") != 1:
        raise RecipeError(f"--push-to-hub {repo!r}: write it as USER/NAME, such as ada/gsm8k-r1")
    if not can_write():
        raise MissingExtraError("pyarrow", "train")
    if HF_HUB_OFFLINE:
        raise DataError("--push-to-hub: HF_HUB_OFFLINE is set, so the hub may not be asked; unset it and run again")
    if not os.environ.get(TOKEN):
        raise DataError(f"--push-to-hub: no token; set {TOKEN} to one that may write to {repo}, and run again")


def push(run: SealedRun, repo: str, private: bool = False) -> str:
    """Upload the data set of a select run in one commit, in place of any earlier one, and return its address.

    Raises RunError if the run has no data set, DataError with the hub's own words if it refuses.
    """
    folder = run.path(FOLDER)
    if not folder.is_dir():
        raise RunError(
            f"{folder}: this run was made without it ({MISSING}); install it, delete {run.folder} and run the same"
            " command again"
        )
    hub, token = _library(), os.environ.get(TOKEN, "")
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token, library_name="distill")
    try:
        address = api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=folder,
            commit_message=f"distill select {run.document['name']} {run.document['identity']}",
            delete_patterns="data/*.parquet",  # an earlier set may have had more files, which would load beside these
        )
    except Exception as error:  # the library raises its own tree, its transport another one
        raise DataError(_why(repo, error, token)) from None
    return str(address)


def _why(repo: str, error: Exception, token: str) -> str:
    said = next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
    said = said.replace(token, "…") if token else said
    return (
        f"{repo}: the hub did not take the data set ({type(error).__name__}: {said[:300]}); check the name, the network"
        f" and that {TOKEN} may write there, and run the same command again"
    )


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "train") from error
    return huggingface_hub
