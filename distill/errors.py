"""The errors a user can meet, as one small tree.

    DistillError                 exit 2   anything the user can mend
    ├── RecipeError              exit 2   a recipe, a key, a value, an override
    ├── DataError                exit 2   prompts, traces, columns
    ├── ModelError               exit 2   a checkpoint, tokenizer or template
    ├── FormatError              exit 2   training text that inference would not see
    ├── EngineError              exit 2   a teacher, endpoint or local engine that cannot answer
    ├── MissingExtraError        exit 2   an optional dependency that is not installed
    ├── StorageError             exit 2   no space, no permission, read-only
    ├── RunError                 exit 2   a locked, foreign or altered run folder
    │   └── LockedError          exit 2   one that another process is writing now
    ├── TrainingError            exit 2   a batch that cannot be trained on
    ├── ExportError              exit 2   a graph that is not what was asked for
    ├── ArtifactError            exit 3   a shipped folder that fails its own check
    ├── GateError                exit 3   a result below the recipe's limits
    ├── IncompleteError          exit 3   answers are missing that may come when asked again
    └── BudgetError              exit 3   a budget was reached; a higher one continues
    Interrupted (KeyboardInterrupt)  exit 130 after SIGINT, 143 after SIGTERM

Every message says what was given, what is allowed and what to do. Only `cli.py` turns them into exit codes.
"""

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class DistillError(Exception):
    """Base of every error that a user can mend; `exit_code` is the process's."""

    exit_code = 2


class RecipeError(DistillError, ValueError):
    """The recipe or an override is not valid."""


class DataError(DistillError, ValueError):
    """Prompts or traces cannot be read as the recipe says."""


class ModelError(DistillError, ValueError):
    """A model, tokenizer or template cannot be found or used."""


class FormatError(DistillError, ValueError):
    """Training text would differ from what inference sends, or carries no supervision."""


class EngineError(DistillError, RuntimeError):
    """An engine cannot answer at all (one failed request is a record, not an error)."""


class MissingExtraError(DistillError, ImportError):
    """An optional dependency is needed and absent."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; add it with: pip install 'distill[{extra}]'")


class StorageError(DistillError, OSError):
    """The disk refused: full, read-only or not permitted."""


class RunError(DistillError, RuntimeError):
    """A run folder is locked, unfinished or holds other bytes than its stage.json says."""


class LockedError(RunError):
    """Another process is writing the folder at this moment."""


class TrainingError(DistillError, RuntimeError):
    """Training cannot start or go on with this data."""


class ExportError(DistillError, RuntimeError):
    """The exporter produced something other than what was asked for."""


class ArtifactError(DistillError, ValueError):
    """A shipped artifact does not match its manifest."""

    exit_code = 3


class GateError(DistillError, RuntimeError):
    """A gate of the recipe was measured and failed."""

    exit_code = 3


class IncompleteError(DistillError, RuntimeError):
    """Some answers are missing; everything bought so far is kept, and the same command asks for the rest."""

    exit_code = 3


class BudgetError(DistillError, RuntimeError):
    """A budget was reached; everything bought so far is kept."""

    exit_code = 3


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after what was finished had been saved.

    A KeyboardInterrupt, because event loops and process pools let that one through and swallow others.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command to continue")
        self.exit_code = 128 + signum


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Say which key of the recipe named the model that is refused inside the block."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from error


STORAGE_ERRNOS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "quota exceeded",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EROFS: "read-only file system",
    errno.ENOTDIR: "a file is in the way",
}


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn the OSErrors of a full, read-only or forbidden disk into `StorageError`; let all others pass."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DistillError) or error.errno not in STORAGE_ERRNOS:
            raise
        where = f" at {error.filename}" if error.filename else ""
        raise StorageError(
            f"{what}: {STORAGE_ERRNOS[error.errno]}{where}; free space or choose another folder with --runs DIR,"
            " then run the same command to continue"
        ) from error
