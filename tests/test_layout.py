"""The walls of the house: who may import whom, and that nothing heavy is imported where the front door stands."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("teachers", "students", "export")
FOLDERS = ("distill", *STAGES, "configs")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute module name, whether it stands at the top of the file) of every import; relative ones are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node in tree.body


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_stage_folders_are_never_imported_as_top_level_names(path: Path) -> None:
    assert not {name.partition(".")[0] for name, _ in imported(path)} & {*STAGES, "configs"}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_never_import_one_another(stage: str) -> None:
    others = {f"distill.{other}" for other in STAGES if other != stage}
    names = {name for path in (ROOT / stage).rglob("*.py") for name, _ in imported(path)}
    assert not {name for name in names for other in others if name == other or name.startswith(other + ".")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_its_siblings_relatively(stage: str) -> None:
    names = {name for path in (ROOT / stage).rglob("*.py") for name, _ in imported(path)}
    assert not {name for name in names if name.startswith(f"distill.{stage}")}


def test_shared_ground_names_stages_late() -> None:
    at_top = {name for path in (ROOT / "distill").rglob("*.py") for name, top in imported(path) if top}
    assert not {name for name in at_top for stage in STAGES if name.startswith(f"distill.{stage}")}


def test_the_check_sees_a_top_level_import(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        "from teachers.ledger import Ledger\ndef f():\n    import distill.export.verify\n"
    )
    assert list(imported(tmp_path / "module.py")) == [("teachers.ledger", True), ("distill.export.verify", False)]


def test_packages_are_the_folders_that_hold_modules() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in MODULES}
    assert listed == {name if name.startswith("distill") else f"distill.{name}" for name in folders}
