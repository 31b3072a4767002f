"""OpenAI-compatible chat endpoints: a pool of servers, each asked as much at once as it takes, no answer lost.

address: where a server is, its key; wire: bodies out, fields in; events: answers that come in pieces; trouble: what
other answers mean; waits: how long servers ask to wait; limits: concurrency found by trial, caps a minute; pool:
weights, health, pauses; exchange: one HTTP exchange; probe: one cheap request before the work; engine: requests,
retries, back-off.
"""

from distill.config import FormatConfig, TeacherConfig
from distill.runs import DigestCache, RunOptions

from .engine import OpenAIEngine

__all__ = ["OpenAIEngine", "preflight", "roots"]


def roots(teacher: TeacherConfig, cache: DigestCache) -> dict[str, str]:
    """Nothing local decides what a server answers."""
    return {}


def preflight(teacher: TeacherConfig, format: FormatConfig, options: RunOptions) -> None:
    """Refuse an address or a key that cannot work; sends nothing.

    Raises EngineError with the remedy.
    """
    OpenAIEngine.from_teacher(teacher, format, options)
