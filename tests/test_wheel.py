"""The wheel: one top-level name, every module and recipe in it, and it works where only its dependencies are."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

STAGE_FOLDERS = ("teachers", "students", "export", "configs")


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what the tree ships (a build in the tree would leave its own folders there)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("distill", *STAGE_FOLDERS):
        _copy(root / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((root / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def _copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Every file of the wheel beside its own metadata."""
    found = zipfile.ZipFile(wheel).namelist()
    return {name for name in found if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a new environment that has the wheel, and this one's packages for its dependencies but not its tree."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    # a plain line in a .pth adds the folder but does not run the .pth files in it, so the editable tree stays out
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_has_one_top_level_name(names: set[str]) -> None:
    assert {name.partition("/")[0] for name in names} == {"distill"}


def test_every_module_is_in_the_wheel(root: Path, names: set[str]) -> None:
    own = {path.relative_to(root).as_posix() for path in (root / "distill").rglob("*.py")}
    mapped = {
        f"distill/{path.relative_to(root).as_posix()}" for name in STAGE_FOLDERS for path in (root / name).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == own | mapped


def test_every_recipe_and_sweep_is_in_the_wheel(root: Path, names: set[str]) -> None:
    folder = root / "configs"
    recipes = {f"distill/configs/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.yaml")}
    assert recipes and recipes == {name for name in names if name.endswith(".yaml")}


def test_the_wheel_says_that_it_is_typed_and_licensed(wheel: Path, names: set[str]) -> None:
    assert "distill/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_nothing_but_code_and_recipes_ships(names: set[str]) -> None:
    assert {Path(name).suffix for name in names} <= {".py", ".yaml", ".typed", ".mjs", ".html"}


def test_the_installed_wheel_runs(bare: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [str(bare / "distill"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    assert run("--version").startswith("distill ")
    run("init", "r1-distill-qwen2.5-0.5b", "--to", "recipe.yaml")
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8").startswith("# DeepSeek-R1 teaches")


def test_the_installed_wheel_finds_its_stages_beside_a_user_s_own_modules(
    bare: Path, root: Path, tmp_path: Path
) -> None:
    for name in STAGE_FOLDERS:
        (tmp_path / f"{name}.py").write_text("raise AssertionError('the wrong module')\n")
    code = "import distill.teachers, distill.students, distill.export, distill.configs as c; print(c.__file__)"
    done = subprocess.run([bare / "python", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert str(root) not in done.stdout and "site-packages" in done.stdout
