"""The student as a GGUF file beside the ONNX graphs, by llama.cpp's own converter where it is on this machine.

The converter is a script of llama.cpp's source tree, `convert_hf_to_gguf.py`: on the PATH, or in the folder that the
environment variable LLAMA_CPP names. Without it the gate is not run. What it writes is read back with transformers and
held against the student, since a wrong permutation or a lost bias converts without a word.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from distill.config import Gates
from distill.records import write_json
from distill.runs import PARTIAL

from .gates import gguf_gate
from .manifest import GateEntry
from .measure import TorchStudent, compare_texts
from .runtimes import last_words
from .texts import Texts

CONVERTER = "convert_hf_to_gguf.py"
HOME = "LLAMA_CPP"
"""Environment variable: a folder of llama.cpp's source tree."""


def find_converter() -> Path | None:
    """The converter's script; None where it is not on this machine."""
    beside = Path(os.environ.get(HOME) or "nowhere") / CONVERTER
    found = shutil.which(CONVERTER)
    return beside if beside.is_file() else Path(found) if found else None


def gguf_file(artifact: Path, kind: str) -> Path:
    """Where a GGUF of a type lies in an artifact."""
    return artifact / "gguf" / f"model-{kind}.gguf"


def convert(converter: Path, checkpoint: Path, kind: str, target: Path) -> str:
    """Write a checkpoint as a GGUF of a type, complete or not at all; what the converter said if it failed, else ""."""
    target.parent.mkdir(exist_ok=True)
    part = target.with_name(target.name + PARTIAL)
    command = [sys.executable, str(converter), str(checkpoint), "--outfile", str(part), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not part.is_file():
        part.unlink(missing_ok=True)
        return last_words(done.stderr).replace(str(checkpoint), "the checkpoint")
    part.rename(target)
    return ""


def gguf_gates(
    checkpoint: Path, kind: str, artifact: Path, note: Path, student: TorchStudent, texts: Texts, limits: Gates
) -> list[GateEntry]:
    """Convert and compare. What was compared is kept in `note`; without a converter the gate is not run, and one that
    failed may work next time.
    """
    if note.exists():
        return [GateEntry.model_validate_json(note.read_text(encoding="utf-8"))]
    shutil.rmtree(gguf_file(artifact, kind).parent, ignore_errors=True)  # nothing ships that was not compared
    converter = find_converter()
    if converter is None:
        return [gguf_gate(kind, None, limits, f"llama.cpp's {CONVERTER} was neither on the PATH nor in {HOME}")]
    if words := convert(converter, checkpoint, kind, gguf_file(artifact, kind)):
        return [gguf_gate(kind, None, limits, words).model_copy(update={"status": "failed"})]
    gate = _compared(kind, artifact, student, texts, limits)
    write_json(note, gate.model_dump(mode="json"))
    return [gate]


def _compared(kind: str, artifact: Path, student: TorchStudent, texts: Texts, limits: Gates) -> GateEntry:
    read_back = TorchStudent(gguf_file(artifact, kind))
    return gguf_gate(kind, compare_texts(read_back, student, texts.documents), limits)
