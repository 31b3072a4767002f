"""Combined verifiers: one verdict of several, in three-valued logic, that records who said what.

Correct and wrong are what is known; `unverifiable`, `timeout` and `error` are not known. Nothing here runs a verifier.
"""

from collections.abc import Sequence

from distill.records import Outcome, Prompt, Trace, Verdict
from distill.verifiers.builtin import verdict_of

UNDECIDED: tuple[Outcome, ...] = ("error", "timeout", "unverifiable")
"""What a combination says that is not decided: the first of these that a part says."""
LONGEST_DETAIL = 200
"""Characters of each part's detail that are kept."""


def decided(name: str, outcomes: Sequence[Outcome], parts: int) -> Outcome | None:
    """What `any_of` or `all_of` so many parts comes to, where the outcomes known so far decide it."""
    settles: Outcome = "correct" if name == "any_of" else "wrong"
    otherwise: Outcome = "wrong" if name == "any_of" else "correct"
    if settles in outcomes:
        return settles
    return otherwise if len(outcomes) == parts and set(outcomes) == {otherwise} else None


def combine(label: str, name: str, prompt: Prompt, trace: Trace, verdicts: Sequence[Verdict | str]) -> Verdict:
    """The verdict of a combination; a string stands for a part that was not asked, and names it."""
    said = [verdict for verdict in verdicts if isinstance(verdict, Verdict)]
    outcomes = [verdict.outcome for verdict in said]
    outcome = decided(name, outcomes, len(verdicts)) or _strongest(outcomes)
    return verdict_of(prompt, trace, outcome, "; ".join(map(_said, verdicts)), label)


def _strongest(outcomes: Sequence[Outcome]) -> Outcome:
    return next(kind for kind in UNDECIDED if kind in outcomes)


def _said(verdict: Verdict | str) -> str:
    if isinstance(verdict, str):
        return f"{verdict} not asked"
    detail = f" ({verdict.detail[:LONGEST_DETAIL]})" if verdict.detail else ""
    return f"{verdict.verifier} {verdict.outcome}{detail}"
