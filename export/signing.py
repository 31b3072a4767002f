"""The artifact's signature: `model.sig`, made by `model-signing` with a private key over every file of the folder.

It signs the manifest too, so the manifest does not list it. Keys are PEM files of elliptic curves (P-256, P-384,
P-521); the private one is read by the library alone and nothing of it is written or shown.
"""

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Any

from distill.errors import ArtifactError, MissingExtraError, RecipeError
from distill.untrusted import file_in, read_bounded

from .manifest import SIGNATURE_FILE, verify_files

KEY_VARIABLE = "DISTILL_SIGNING_KEY"
"""Environment variable with the path of the private key."""


def sign_artifact(folder: Path, key: Path | None = None) -> Path:
    """Sign an artifact that is what its manifest says, with `key` or the key that DISTILL_SIGNING_KEY names.

    Returns the signature's path; one that is there is replaced. Raises RecipeError for a key that is missing or not
    usable, ArtifactError for an artifact that is not intact or holds links, MissingExtraError without model-signing.
    """
    named = key or (Path(os.environ[KEY_VARIABLE]) if os.environ.get(KEY_VARIABLE) else None)
    if named is None:
        raise RecipeError(f"no key to sign with; give --key KEY.pem, or its path in {KEY_VARIABLE}")
    library = _library("signing")
    _readable(named)
    verify_files(folder)
    try:
        signer = library.Config().use_elliptic_key_signer(private_key=named)
    except Exception:  # the libraries below raise trees of their own; their words may quote the key
        raise RecipeError(
            f"{named}: is no private key that can sign; give an unencrypted PEM of curve P-256, P-384 or P-521, such"
            " as `openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem` writes"
        ) from None
    folder = folder.resolve()
    part = folder.with_name(f".{folder.name}.{SIGNATURE_FILE}.part")  # beside the folder, or it would sign itself
    try:
        signer.set_hashing_config(_hashing()).sign(folder, part)
        os.replace(part, folder / SIGNATURE_FILE)
    except ValueError as error:
        raise ArtifactError(f"{folder}: cannot be signed: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return folder / SIGNATURE_FILE


def signature_problem(folder: Path, public_key: Path) -> str | None:
    """Why the artifact's signature is not one of all its files by the key; None where it is.

    Raises RecipeError for a key file that is missing or no public key, MissingExtraError without model-signing.
    """
    library = _library("verifying")
    _readable(public_key)
    try:
        verifier = library.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise RecipeError(
            f"{public_key}: is no public key of curve P-256, P-384 or P-521 in PEM ({type(error).__name__})"
        ) from error
    try:
        read_bounded(file_in(folder, SIGNATURE_FILE))
        with contextlib.redirect_stdout(sys.stderr):  # the library prints about old signatures
            verifier.set_hashing_config(_hashing()).verify(folder, folder / SIGNATURE_FILE)
    except Exception as error:  # a hostile signature may fail anywhere below; whatever fails is not a good signature
        return _why(error)
    return None


def _why(error: Exception) -> str:
    """The library's words in one line, without the digests' bytes."""
    said = str(error)
    differ = re.findall(r"Hash mismatch for '([^']+)'", said)
    listed = re.findall(r"""files (?:found )?in model '[^']*': ([^"'\]]+)""", said)
    differ += [name for names in listed for name in names.split(", ")]
    if differ:
        return f"the key signed other bytes: {', '.join(sorted(differ))[:300]}"
    said = " ".join(said.split())[:300]
    return said or f"the key did not make it ({type(error).__name__})"


def _hashing() -> Any:
    """Every file but the signature, hidden ones and git's included; links are refused."""
    return _library("hashing").Config().set_ignored_paths(paths=[SIGNATURE_FILE], ignore_git_paths=False)


def _library(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as error:
        raise MissingExtraError("model-signing", "sign") from error


def _readable(key: Path) -> None:
    if not key.is_file():
        raise RecipeError(f"{key}: there is no such key file")
