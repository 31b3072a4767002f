"""Uploading a finished folder to the Hugging Face hub, on request only.

The token comes from HF_TOKEN and is never written or shown. Where something lies on the hub, and whether it is private,
is no part of any identity.
"""

import os
from pathlib import Path
from typing import Any, Literal

from distill.errors import DataError, MissingExtraError, RecipeError

TOKEN = "HF_TOKEN"  # noqa: S105  # the name of a variable, not its value

Kind = Literal["dataset", "model"]
WORDS: dict[Kind, str] = {"dataset": "data set", "model": "model"}


def check_push(repo: str) -> None:
    """Refuse, before any work is done, what cannot be pushed from here.

    Raises RecipeError for a name that is none, DataError without a token or where the hub may not be asked,
    MissingExtraError without the library.
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
    if HF_HUB_OFFLINE:
        raise DataError("--push-to-hub: HF_HUB_OFFLINE is set, so the hub may not be asked; unset it and run again")
    if not os.environ.get(TOKEN):
        raise DataError(f"--push-to-hub: no token; set {TOKEN} to one that may write to {repo}, and run again")


def upload(folder: Path, repo: str, kind: Kind, message: str, replaced: list[str], private: bool = False) -> str:
    """Upload a folder as it is and return its address.

    Files that are there already and match a pattern of `replaced` are deleted with it: they would be loaded beside
    these. A repository that is there stays as public as it is. Raises DataError with the hub's own words if it refuses.
    """
    hub, token = _library(), os.environ.get(TOKEN, "")
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token, library_name="distill")
    try:
        address = api.create_repo(repo, repo_type=kind, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo, repo_type=kind, folder_path=folder, commit_message=message, delete_patterns=replaced
        )
    except Exception as error:  # the library raises its own tree, its transport another one
        raise DataError(_why(repo, kind, error, token)) from None
    return str(address)


def _why(repo: str, kind: Kind, error: Exception, token: str) -> str:
    said = next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
    said = said.replace(token, "…") if token else said
    return (
        f"{repo}: the hub did not take the {WORDS[kind]} ({type(error).__name__}: {said[:300]}); check the name, the"
        f" network and that {TOKEN} may write there, and run the same command again"
    )


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "train") from error
    return huggingface_hub
