"""Trials that are chosen as results come in, by Optuna; its study lies in a database in the sweep's folder.

What is proposed depends on nothing but what the study holds: the sampler is made anew for each proposal, seeded by how
many there were. A driver that was killed therefore goes on as one that was not, and takes up the trials that were open.
"""

import itertools
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from distill.errors import MissingExtraError, RecipeError, RunError

from .config import Dimension, Objective, Search, SweepFile
from .record import STUDY
from .trials import Numbers, Recipes, Trial, trials_of

REFUSED_IN_A_ROW = 1000
"""Proposals that the rules may refuse one after the other before the search gives up."""


def optuna() -> Any:
    """The library, its log on stderr silenced. Raises MissingExtraError if it is absent."""
    try:
        import optuna as library
    except ImportError as error:
        raise MissingExtraError("optuna", "sweep") from error
    library.logging.set_verbosity(library.logging.WARNING)
    warnings.filterwarnings("ignore", category=library.exceptions.ExperimentalWarning)
    return library


@dataclass(frozen=True)
class Proposal:
    """One proposal of the study: the trials of its combination, one a seed."""

    number: int
    """Its number in the study."""
    trials: tuple[Trial, ...]


class Searcher:
    """Asks the study for trials and tells it what they gave."""

    def __init__(self, file: SweepFile, recipes: Recipes, numbers: Numbers, folder: Path) -> None:
        assert file.sweep.search is not None
        self.file, self.recipes, self.numbers = file, recipes, numbers
        self.search: Search = file.sweep.search
        self.library = optuna()
        self.distributions = {key: self._distribution(one) for key, one in self.search.space.items()}
        with database_errors(self.search):
            self.study = self._open(folder)
            self._read()

    def _read(self) -> None:
        self.open = [proposal for trial in self._running() if (proposal := self._resumed(trial))]
        self.past = [self._proposal(trial) for trial in self._told()]
        """Proposals that had ended when the driver began."""

    def _open(self, folder: Path) -> Any:
        directions = ["maximize" if one.rising else "minimize" for one in self.file.sweep.objectives]
        self.storage = open_storage(self.search, folder)
        study = self.library.create_study(
            storage=self.storage, study_name=self.file.sweep.name, directions=directions, load_if_exists=True
        )
        if [direction.name.lower() for direction in study.directions] != directions:
            raise RecipeError(
                f"{self.file.place('objectives')}: the study in {folder} was started with other objectives; give the"
                " sweep another name, or take the objectives that it had"
            )
        return study

    def _distribution(self, one: Dimension) -> Any:
        of = self.library.distributions
        if one.choice is not None:
            return of.CategoricalDistribution([json.dumps(value) for value in one.choice])
        if one.integer is not None:
            return of.IntDistribution(*one.integer, log=one.log, step=int(one.step or 1))
        assert one.real is not None  # the dimension's own validation
        return of.FloatDistribution(*one.real, log=one.log, step=one.step)

    # --- what the study holds

    def _complete(self) -> list[Any]:
        """Trials whose proposal is whole: a kill may tear one."""
        wanted = set(self.distributions)
        return [trial for trial in self.study.get_trials(deepcopy=False) if set(trial.params) == wanted]

    def _running(self) -> list[Any]:
        running = self.library.trial.TrialState.RUNNING
        for trial in self.study.get_trials(deepcopy=False, states=(running,)):
            if set(trial.params) != set(self.distributions):
                self.study.tell(trial.number, state=self.library.trial.TrialState.FAIL)
        return [trial for trial in self._complete() if trial.state == running]

    def _told(self) -> list[Any]:
        """What has ended, failures included: those are tried once more, though the study has counted them."""
        return [trial for trial in self._admitted() if trial.state != self.library.trial.TrialState.RUNNING]

    def _resumed(self, trial: Any) -> Proposal | None:
        """An open trial; None, and told so, where the rules do not admit it: the driver was killed in between."""
        if not self.recipes.admits(self.file.sweep.when, self._overrides(trial.params)):
            self.study.tell(trial.number, state=self.library.trial.TrialState.FAIL)
            return None
        return self._proposal(trial)

    def _overrides(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: json.loads(params[key]) if self.search.space[key].choice is not None else params[key]
            for key in self.search.space
        }

    def _proposal(self, trial: Any) -> Proposal:
        place = self.file.place("search", "space")
        made = trials_of(self.file.sweep, self.recipes, self._overrides(trial.params), self.numbers, place)
        return Proposal(trial.number, tuple(made))

    def close(self) -> None:
        """Close the connections to the study's database."""
        if isinstance(self.storage, self.library.storages.RDBStorage):
            self.storage.remove_session()
            self.storage.engine.dispose()

    # --- asking and telling

    @property
    def owed(self) -> int:
        """Proposals that may still be made."""
        limit = self.file.sweep.limits.trials
        most = (
            self.search.trials
            if limit is None
            else min(self.search.trials, limit // max(1, len(self.file.sweep.seeds)))
        )
        return max(0, most - len(self._admitted()))

    def _admitted(self) -> list[Any]:
        return [
            trial
            for trial in self._complete()
            if self.recipes.admits(self.file.sweep.when, self._overrides(trial.params))
        ]

    def ask(self) -> Proposal | None:
        """One more proposal; None if there are enough, or no combination is left."""
        if not self.owed:
            return None
        for _ in range(REFUSED_IN_A_ROW):
            sampler = self._sampler(self._complete())
            if sampler is None:
                return None
            self.study.sampler = sampler
            trial = self.study.ask(fixed_distributions=self.distributions)
            if self.recipes.admits(self.file.sweep.when, self._overrides(trial.params)):
                proposal = self._proposal(trial)
                self.open.append(proposal)
                return proposal
            self.study.tell(trial.number, state=self.library.trial.TrialState.FAIL)
        raise RecipeError(
            f"{self.file.place('when')}: {REFUSED_IN_A_ROW} proposals in a row were excluded by the rules; narrow the"
            " space instead"
        )

    def _sampler(self, asked: Sequence[Any]) -> Any:
        """What proposes the next trial, given all that were asked for; None where nothing is left to propose."""
        of, seed = self.library.samplers, self.search.seed + len(asked)
        if self.search.sampler == "random":
            return of.RandomSampler(seed=seed)
        if self.search.sampler == "grid":
            left = self._untried([trial.params for trial in asked])
            return None if left is None else of.PartialFixedSampler(left, of.RandomSampler(seed=seed))
        return of.TPESampler(
            seed=seed, n_startup_trials=self.search.startup, constant_liar=self.search.parallel > 1, multivariate=True
        )

    def _untried(self, asked: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """The first combination of the whole grid that was not proposed yet."""
        values = [grid_values(one, f"search.space.{key}") for key, one in self.search.space.items()]
        combinations = (dict(zip(self.search.space, chosen)) for chosen in itertools.product(*values))
        return next((one for one in combinations if one not in asked), None)

    def tell(self, proposal: Proposal, values: Sequence[float] | None, pruned: bool = False) -> None:
        """Say what a proposal gave: a value for each objective, or None where it failed or was pruned."""
        state = self.library.trial.TrialState
        if values is not None:
            self.study.tell(proposal.number, list(values))
        elif pruned and len(self.study.directions) == 1:
            self.study.tell(proposal.number, state=state.PRUNED)
        else:
            self.study.tell(proposal.number, state=state.FAIL)
        self.open.remove(proposal)


def grid_values(one: Dimension, name: str) -> list[Any]:
    """Every value of a dimension. Raises RecipeError for one that has no end of them."""
    if one.choice is not None:
        return [json.dumps(value) for value in one.choice]
    if one.integer is not None and not one.log:
        return list(range(one.integer[0], one.integer[1] + 1, int(one.step or 1)))
    if one.real is not None and one.step:
        steps = int((one.real[1] - one.real[0]) / one.step + 1e-9)
        return [one.real[0] + index * one.step for index in range(steps + 1)]
    raise RecipeError(f"{name}: sampler grid takes choice, int without log, or float with a step")


def open_storage(search: Search, folder: Path) -> Any:
    """The study's database: a journal or SQLite in the sweep's folder, or the one whose url a variable holds."""
    library = optuna()
    if search.storage_env is not None:
        url = os.environ.get(search.storage_env)
        if not url:
            raise RecipeError(
                f"search.storage_env is {search.storage_env}, but there is no such environment variable; set it to the"
                " url of the database, or leave the key out"
            )
        with database_errors(search):
            return library.storages.RDBStorage(url)
    if search.storage == "sqlite":
        return library.storages.RDBStorage(f"sqlite:///{(folder / STUDY).resolve()}.db")
    journal = library.storages.journal
    path = str(folder / f"{STUDY}.journal")
    Path(f"{path}.lock").unlink(missing_ok=True)  # of a driver that was killed: the sweep's own lock is ours
    lock = journal.JournalFileOpenLock(path)
    return library.storages.JournalStorage(journal.JournalFileBackend(path, lock_obj=lock))


@contextmanager
def database_errors(search: Search) -> Iterator[None]:
    """Turn what a database refuses into RunError; the url, which holds its password, is named by its variable only."""
    try:
        yield
    except ImportError:
        if search.storage_env is None:
            raise
        raise RecipeError(
            f"the driver that the url in {search.storage_env} asks for is not installed; for PostgreSQL: pip install"
            " 'psycopg[binary]'"
        ) from None
    except _database_exceptions() as error:
        if search.storage_env is None:
            raise
        said = _without_url(str(getattr(error, "orig", None) or error), os.environ.get(search.storage_env, ""))
        # without its cause, whose text may hold the url
        raise RunError(
            f"the study's database, whose url is in {search.storage_env}, does not answer: {said}; what it was told so"
            " far is kept: run the same command again when it is there"
        ) from None


def _database_exceptions() -> tuple[type[Exception], ...]:
    from sqlalchemy.exc import SQLAlchemyError

    return SQLAlchemyError, optuna().exceptions.StorageInternalError


def _without_url(text: str, url: str) -> str:
    """One line without the url or any password in it, however it is written."""
    parts = urlsplit(url)
    secrets = {url, parts.password or "", unquote(parts.password or ""), parts.netloc}
    for secret in sorted(secrets - {""}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return " ".join(text.split())


def objective_values(measured: Mapping[str, float | None], objectives: Sequence[Objective]) -> list[float] | None:
    """A value for each objective; None if one is missing."""
    values = [measured.get(one.title) for one in objectives]
    return [value for value in values if value is not None] if None not in values else None
