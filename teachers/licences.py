"""What licences say of a data set made under them: which are missing, not known, or do not go together.

A list of things to settle, by what names of licences tell; no legal advice.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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


def hub_fields(stated: Sequence[Stated]) -> dict[str, Any]:
    """The `license` of a data set's header: one id or several; `unknown` or `other` where ids do not say all."""
    if any(one.licence is None for one in stated):
        return {"license": "unknown"}
    ids = sorted({hub_id(str(one.licence)) or "other" for one in stated})
    return {"license": ids[0] if len(ids) == 1 else "other" if "other" in ids else ids}


def problems(stated: Sequence[Stated]) -> Iterator[str]:
    """What is to be settled, a sentence each."""
    for whose, licence, remedy in stated:
        known = hub_id(licence) if licence else None
        if licence is None:
            yield f"{whose}: no licence is stated; once it is known, set {remedy} in the recipe and select again."
        elif known is None:
            yield f"{whose}: `{licence}` is no licence that hubs have an id for; read its terms."
        elif "-nd-" in known:
            yield f"{whose}: `{known}` forbids changed versions, and this data set is one."
        elif "-nc-" in known:
            yield f"{whose}: `{known}` forbids commercial use."
    yield from contradictions(stated)


def contradictions(stated: Sequence[Stated]) -> Iterator[str]:
    """Licences that cannot all be kept in one data set."""
    for whose in dict.fromkeys(one.whose for one in stated):
        several = sorted({f"`{one.licence}`" for one in stated if one.whose == whose and one.licence})
        if len(several) > 1:
            yield f"{whose}: {' and '.join(several)} are stated side by side."
    alike = {(hub_id(one.licence), one.whose) for one in stated if one.licence and _share_alike(one.licence)}
    if len({licence for licence, _ in alike}) > 1:
        parts = ", ".join(f"`{licence}` ({whose})" for licence, whose in sorted(alike, key=str))
        yield f"Each of these asks that works made from it keep its own terms, so they contradict one another: {parts}."


def _share_alike(licence: str) -> bool:
    known = hub_id(licence)
    return known is not None and _SHARE_ALIKE.search(known) is not None
