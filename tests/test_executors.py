"""Shards in processes of their own and on a Ray cluster: the result is that of one process, whoever dies."""

import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from distill import api
from distill.config import Recipe, recipe_from
from distill.errors import IncompleteError, RecipeError
from distill.executors import Job, run_job


@pytest.fixture(scope="module")
def chat() -> Any:
    path = Path(__file__).parent / "chat_server.py"
    spec = importlib.util.spec_from_file_location("chat_server", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["chat_server"] = module
    spec.loader.exec_module(module)
    return module


def recipe_for(server: Any, folder: Path, count: int) -> Recipe:
    """A recipe over a file of prompts."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(f'{{"question": "problem {n}", "answer": "9"}}\n' for n in range(count)))
    endpoint = {"base_url": server.base_url, "concurrency": 4, "max_retries": 0, "timeout_s": 20}
    return recipe_from(
        {
            "name": "r",
            "prompts": [{"name": "file", "file": str(file)}],
            "teacher": {"engine": "openai", "model": "r1", "endpoint": endpoint, "probe": False},
        }
    )


def digest_of(outcome: Any) -> str:
    return str(outcome.results["generate"].digest)


def test_local_shards_give_what_one_process_gives(chat: Any, tmp_path: Path) -> None:
    with chat.ChatServer() as server:
        recipe = recipe_for(server, tmp_path, 30)
        whole = api.generate(recipe, runs=tmp_path / "one", quiet=True)
        parts = api.generate_shards(recipe, 2, runs=tmp_path / "two", quiet=True)
        assert digest_of(parts) == digest_of(whole)
        assert max(server.asked.values()) == 2  # once a run store
        assert len(server.requests) == 60


def test_a_local_shard_whose_process_is_killed_is_run_again(chat: Any, tmp_path: Path) -> None:
    killed: list[int] = []

    def plan(number: int, body: Any) -> Any:
        if number == 10:
            killed.extend(children_of(os.getpid()))
            for pid in killed[:1]:
                os.kill(pid, signal.SIGKILL)
        return chat.Reply(delay_s=0.02)

    with chat.ChatServer(plan) as server:
        recipe = recipe_for(server, tmp_path, 30)
        outcome = api.generate_shards(recipe, 1, runs=tmp_path / "runs", quiet=True)
        assert killed and outcome.results["generate"].counts["answered"] == 30
        assert 30 < len(server.requests) <= 30 + 4


def children_of(pid: int) -> list[int]:
    """Processes that run Python's spawn for us."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and b"spawn_main" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_shards_that_cannot_finish_are_named_and_the_others_are_kept(chat: Any, tmp_path: Path) -> None:
    def plan(number: int, body: Any) -> Any:
        return chat.Reply(500, b"boom") if body["messages"][-1]["content"] == "problem 3" else chat.Reply()

    with chat.ChatServer(plan) as server:
        recipe = recipe_for(server, tmp_path, 12)
        with pytest.raises(IncompleteError, match=r"1 of 2 shards did not finish.*1 requests failed"):
            api.generate_shards(recipe, 2, runs=tmp_path / "runs", quiet=True)
        server.plan = lambda *_: chat.Reply()
        before = len(server.requests)
        outcome = api.generate_shards(recipe, 2, runs=tmp_path / "runs", quiet=True)
        assert len(server.requests) == before + 1
        assert outcome.results["generate"].counts["answered"] == 12


def test_an_unknown_executor_and_another_version_are_refused(chat: Any, tmp_path: Path) -> None:
    with chat.ChatServer() as server:
        recipe = recipe_for(server, tmp_path, 2)
        with pytest.raises(RecipeError, match="choose one of local, ray"):
            api.generate_shards(recipe, 2, "slurm", runs=tmp_path / "runs")
        job = Job(recipe.model_dump_json(), str(tmp_path), str(tmp_path / "runs"), 1, 1, "auto", 1, "0.0.0")
        done = run_job(job)
        assert done.exit_code == 2 and "install the same version" in str(done.error)
        assert server.requests == []


# --- a real cluster -------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_ray_cluster_that_loses_a_node_midway_gives_what_one_process_gives(
    chat: Any, tmp_path: Path, ray_cluster: Any
) -> None:
    with chat.ChatServer() as server:
        whole = api.generate(recipe_for(server, tmp_path, 80), runs=tmp_path / "one", quiet=True)
        expected = len(server.requests)
    lost = threading.Event()
    with ray_cluster.two_nodes() as second:

        def plan(number: int, body: Any) -> Any:
            if number == 30 and not lost.is_set():
                lost.set()
                threading.Thread(target=ray_cluster.kill, args=(second,)).start()
            return chat.Reply(delay_s=0.2)

        with chat.ChatServer(plan) as server:
            parts = api.generate_shards(recipe_for(server, tmp_path, 80), 4, "ray", runs=tmp_path / "two", quiet=True)
            assert lost.is_set() and second.returncode is not None
            assert digest_of(parts) == digest_of(whole)
            assert expected <= len(server.requests) <= expected + 4 * 4 * 2
