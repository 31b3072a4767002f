"""What `distill doctor` says of the code sandbox, with and without one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.verifiers.sandbox import sandbox_problem


@pytest.fixture(autouse=True)
def _tried_anew() -> Iterator[None]:
    sandbox_problem.cache_clear()
    yield
    sandbox_problem.cache_clear()


def test_doctor_says_whether_the_code_sandbox_works(cli: Any) -> None:
    problem = sandbox_problem()
    assert cli("doctor", "--json", "--threads", 1).json["code_sandbox"] == {"usable": not problem, "problem": problem}
    assert f"\nsandbox    {'no' if problem else 'yes'} (verifier code)" in cli("doctor").out


def test_doctor_says_what_to_install_where_there_is_none(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = cli("doctor").out
    assert "sandbox    no (verifier code): bwrap is not installed; install bubblewrap 0.8 or newer" in said
