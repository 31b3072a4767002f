"""What licences say of a data set or a model made under them: which are missing, not known, or do not go together.

A list of things to settle, by what names of licences tell; no legal advice.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from distill.cards import code, text

HUB_IDS = frozenset(
    [
        *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "isc", "ncsa", "zlib", "unlicense"),
        *("cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
        *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
        *("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "odc-by", "odbl", "pddl", "c-uda", "gfdl"),
        *("cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0"),
        *("lgpl", "lgpl-2.1", "lgpl-3.0", "mpl-2.0", "epl-1.0", "epl-2.0", "artistic-2.0", "afl-3.0", "wtfpl"),
        *("openrail", "bigscience-openrail-m", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma"),
    ]
)
"""Licences that the hub has an id for."""
PERMISSIVE = frozenset(
    [
        *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "isc", "ncsa", "zlib", "unlicense"),
        *("cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "odc-by", "pddl", "afl-3.0", "wtfpl"),
        *("cdla-permissive-1.0", "cdla-permissive-2.0"),
    ]
)
"""Licences that ask for no more than notices of what is made under them."""
NAMED_LLAMA = {"llama3": "Llama 3", "llama3.1": "Llama", "llama3.2": "Llama", "llama3.3": "Llama"}
"""How the name of a model must begin that is made with one under these licences (their section 1.b.i)."""
FOR_ITS_OWN_KIND = ("llama2", "llama3")
"""Licences that forbid using what their models write to improve models outside their family (their section 1.b.v)."""
_SHARE_ALIKE = re.compile(r"-sa-|^a?gpl|^gfdl|^odbl|sharing")


class Stated(NamedTuple):
    """A licence and whose it is."""

    whose: str
    licence: str | None
    remedy: str
    """Where to state it."""


def hub_id(licence: str) -> str | None:
    """The hub's id of a licence, however it is spelled; None where it has none."""
    plain = re.sub(r"[\s_]+", "-", licence.strip().lower()).removeprefix("the-")
    plain = re.sub(r"-licen[cs]e$", "", plain)
    plain = re.sub(r"^apache-(?:v|version-)?2(?:\.0)?$", "apache-2.0", re.sub(r"^cc-?0$", "cc0-1.0", plain))
    return plain if plain in HUB_IDS else None


def in_table(licences: Iterable[str | None]) -> str:
    """Licences in a cell of a card's table."""
    return ", ".join(sorted(text(licence) if licence else "**not stated**" for licence in licences))


class Made(NamedTuple):
    """What is made under the licences, in the words of its card."""

    once_known: str
    """What to do when a licence is found out; `{remedy}` is where the recipe states it."""
    changed: str
    """What it is to a licence that forbids changed versions."""


DATA_SET = Made("set {remedy} in the recipe and select again", "this data set is one")
# the card itself is sealed with its run
MODEL = Made(
    "say it where this model is published, and set {remedy} in the recipe of the next one",
    "a model made from it may be one",
)


def hub_fields(stated: Sequence[Stated]) -> dict[str, Any]:
    """The `license` of a data set's header: one id or several; `unknown` or `other` where ids do not say all."""
    if any(one.licence is None for one in stated):
        return {"license": "unknown"}
    ids = sorted({hub_id(str(one.licence)) or "other" for one in stated})
    return {"license": ids[0] if len(ids) == 1 else "other" if "other" in ids else ids}


def model_fields(base: str | None, others: Sequence[Stated]) -> dict[str, Any]:
    """The `license` of a model's header: its base's where all others ask for no more than notices.

    `unknown` where one is not stated; `other` where terms meet that no one id says.
    """
    stated = [base, *(one.licence for one in others)]
    if any(licence is None for licence in stated):
        return {"license": "unknown"}
    own = hub_id(str(base))
    asking = {hub_id(str(licence)) for licence in stated} - PERMISSIVE
    if own is not None and asking <= {own}:
        return {"license": own}
    return {"license": "other", "license_name": "see-card"}


def problems(stated: Sequence[Stated], made: Made = DATA_SET) -> Iterator[str]:
    """What is to be settled, a sentence each, in Markdown."""
    for whose, licence, remedy in stated:
        known = hub_id(licence) if licence else None
        if licence is None:
            then = made.once_known.format(remedy=remedy)
            yield f"{text(whose)}: no licence is stated; once it is known, {then}."
        elif known is None:
            yield f"{text(whose)}: {code(licence)} is no licence that hubs have an id for; read its terms."
        elif "-nd-" in known:
            yield f"{text(whose)}: `{known}` forbids changed versions, and {made.changed}."
        elif "-nc-" in known:
            yield f"{text(whose)}: `{known}` forbids commercial use."
    yield from contradictions(stated)


def contradictions(stated: Sequence[Stated]) -> Iterator[str]:
    """Licences that cannot all be kept in one work."""
    for whose in dict.fromkeys(one.whose for one in stated):
        several = sorted({code(one.licence) for one in stated if one.whose == whose and one.licence})
        if len(several) > 1:
            yield f"{text(whose)}: {' and '.join(several)} are stated side by side."
    alike = {(hub_id(one.licence), one.whose) for one in stated if one.licence and _share_alike(one.licence)}
    if len({licence for licence, _ in alike}) > 1:
        parts = ", ".join(f"`{licence}` ({text(whose)})" for licence, whose in sorted(alike, key=str))
        yield f"Each of these asks that works made from it keep its own terms, so they contradict one another: {parts}."


def model_terms(base: Stated, teachers: Sequence[Stated], name: str = "") -> Iterator[str]:
    """What some models' licences ask of a model that is made from them or from what they write, a sentence each.

    `name` is that model's: what it fulfils already is left out.
    """
    ids = {one: hub_id(one.licence) for one in (base, *teachers) if one.licence}
    for one, known in ids.items():
        if known in NAMED_LLAMA and not name.startswith(NAMED_LLAMA[known]):
            yield f"{text(one.whose)}: `{known}` asks that this model's name begin with `{NAMED_LLAMA[known]}`."
    for one in teachers:
        known = ids.get(one)
        if known in FOR_ITS_OWN_KIND and ids.get(base) != known:
            yield f"{text(one.whose)}: `{known}` forbids using what it writes to improve models outside its own family."
        if known == "gemma":
            yield f"{text(one.whose)}: `gemma` takes a model trained on its answers for a derivative under its terms."


def _share_alike(licence: str) -> bool:
    known = hub_id(licence)
    return known is not None and _SHARE_ALIKE.search(known) is not None
