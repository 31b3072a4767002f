"""A search whose study lies in PostgreSQL: a real server on loopback, with a password that nothing may give away."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distill.errors import RunError
from distill.runs import RunOptions
from distill.sweep.record import read_record
from distill.sweep.run import run_sweep
from distill.sweep.schedule import Scheduler

BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/usr/local/bin"))
PASSWORD = "open sesame/%41"
QUOTED = "open%20sesame%2F%2541"

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not (BINARIES / "initdb").exists(), reason="no PostgreSQL server is installed"),
]
pytest.importorskip("optuna")
pytest.importorskip("psycopg")


class Server(NamedTuple):
    """A running server: its url, and a function that stops it."""

    url: str
    stop: Callable[[], None]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that another account can reach, which those below pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="postgresql-") as name:
        yield Path(name)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    """A new PostgreSQL server on loopback that wants a password."""
    account = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root
    if account:
        shutil.chown(folder, account)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(program: str, *arguments: object) -> None:
        command = [str(BINARIES / program), "-D", str(folder / "data"), *map(str, arguments)]
        subprocess.run(command, check=True, user=account, stdout=-3, stderr=-3, cwd="/")

    run("initdb", "-U", "tuner", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}")
    settings = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
    run("pg_ctl", "-w", "-l", folder / "log", "-o", settings, "start")
    running = True

    def stop() -> None:
        nonlocal running
        if running:
            running = False
            run("pg_ctl", "-m", "immediate", "stop")

    try:
        yield Server(f"postgresql+psycopg://tuner:{QUOTED}@127.0.0.1:{port}/postgres", stop)
    finally:
        stop()


def sweep_over(lab: Any, folder: Path, **changes: Any) -> Path:
    lab.write_light_recipe(folder)
    space = {"prompts.0.split_seed": {"int": [0, 50]}, "select.per_prompt": {"choice": ["first", "shortest"]}}
    search = {"space": space, "trials": 5, "startup": 2, "storage_env": "STUDY_URL", **changes}
    path: Path = lab.write_sweep(folder, search=search, objectives=[{"metric": "accuracy", "model": "teacher"}])
    return path


def proposals(runs: Path) -> list[dict[str, Any]]:
    record = read_record("sweep", runs)
    return [dict(record.trial(number).overrides) for number in sorted(record.numbers)]


def given_away(text: str | bytes) -> bool:
    text = text if isinstance(text, bytes) else text.encode()
    return any(secret.encode() in text for secret in (PASSWORD, QUOTED, "sesame"))


def test_a_study_in_postgresql_proposes_what_one_in_a_file_does_and_its_password_is_written_nowhere(
    lab: Any, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STUDY_URL", server.url)
    path = sweep_over(lab, tmp_path)
    options = RunOptions(tmp_path / "runs", "cpu")
    assert run_sweep(path, options, "local").done == 5
    again = run_sweep(path, options, lab.Inline())
    assert again.done == 5 and again.summary.executed == []
    file = sweep_over(lab, tmp_path, storage_env=None)
    run_sweep(file, RunOptions(tmp_path / "file", "cpu"), lab.Inline())
    assert proposals(tmp_path / "runs") == proposals(tmp_path / "file")
    written = [one for one in (tmp_path / "runs").rglob("*") if one.is_file()]
    assert len(written) > 20 and not [one for one in written if given_away(one.read_bytes())]
    said = capfd.readouterr()
    assert not given_away(said.out + said.err)


def test_a_database_that_refuses_or_goes_away_is_one_line_without_its_password(
    lab: Any, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    path = sweep_over(lab, tmp_path)
    options = RunOptions(tmp_path / "runs", "cpu", quiet=True)
    for url, reason in (
        (server.url.replace(QUOTED, "sesame-seed"), "password authentication failed"),
        (server.url.replace("127.0.0.1:", "127.0.0.1:9"), "invalid port|refused|out of range|Could not parse"),
        (f"not a url {QUOTED}", "Could not parse"),
        (server.url.replace("postgresql+psycopg:", "oracle:"), "driver"),
    ):
        monkeypatch.setenv("STUDY_URL", url)
        said = cli("sweep", path, "--runs", tmp_path / "runs", "--quiet")
        assert said.code == 2 and not given_away(said.err + said.out), said.err
        assert "STUDY_URL" in said.error_line
        assert any(one in said.error_line for one in reason.split("|")), said.error_line
    monkeypatch.setenv("STUDY_URL", server.url)

    def goes_away(scheduler: Scheduler) -> None:
        if len(scheduler.summary.executed) >= 4:
            server.stop()

    with pytest.raises(RunError, match="whose url is in STUDY_URL, does not answer") as caught:
        run_sweep(path, options, lab.Inline(), goes_away)
    assert not given_away(str(caught.value))
    assert list((tmp_path / "runs").glob("*/*/stage.json"))  # what was finished is kept
