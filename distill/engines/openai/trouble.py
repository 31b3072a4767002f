"""What an answer other than a good one means: try again, wait, give this prompt up, or stop asking this server.

Trouble is a record, not an exception, because most of it is part of a day's work: only the last server's fatal answer
is raised, by the pool.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from distill.errors import EngineError

from .address import Address
from .waits import asked_wait_s

TOO_MANY = 429
PASSING = {408, 409, 425, TOO_MANY}
"""Statuses below 500 that can pass by themselves."""
OVERLOAD = {TOO_MANY, 503, 504, 529}
"""Statuses that say that it is too much; 529 is what some hosts add for it."""
ABOUT_THE_REQUEST = {400, 413, 422}
"""Statuses that may concern one prompt only."""
SHOWN_CHARS = 300
"""How much of a server's message is quoted."""

ONE_PROMPT = re.compile(r"context.{0,10}(length|window|size)|too long|content.{0,20}(filter|risk)", re.I)
"""Messages that concern this prompt only: it does not fit, or a filter refuses it."""
NOT_TAKEN = re.compile(r"support|unknown|unrecogni[sz]ed|not permitted|not allowed|unexpected|invalid|extra|only", re.I)
"""Words with which servers refuse a parameter that they name."""
REMEDIES_BY_PARAMETER = {
    "stream_options": "set stream: false for this endpoint",
    "temperature": "set teacher.sampling.temperature to what it takes (often 1)",
    "top_p": "set teacher.sampling.top_p to what it takes (often 1)",
    "seed": "ask it through a gateway that drops seed, or choose another server",
    "max_completion_tokens": "it takes no max_tokens; such models do not send their reasoning, choose another",
    "max_tokens": "set teacher.sampling.max_new_tokens to what it takes",
}
"""For each parameter that a request carries, what to do where the server names it in a refusal."""


class Trouble(NamedTuple):
    """Why there is no answer."""

    kind: Literal["again", "later", "refused", "fatal"]
    """`again` counts as a try; `later` is a server that said when to come back; `refused` is this prompt's own."""
    said: str
    """Without the key, in one line."""
    wait_s: float = 0.0
    """How long the server asks to be left alone."""
    overload: bool = False
    """Whether the server has too much to do."""


def trouble_of(address: Address, status: int, headers: Mapping[str, str], body: str, proven: bool) -> Trouble:
    """What a status other than 200 means. `proven`: this server has answered requests of this run before.

    A server that has answered others of the same model and sampling refuses a request for what is in it.
    """
    said = f"{status} {shown(address, server_message(body) or STATUS_WORDS.get(status, ''))}".strip()
    if status == TOO_MANY and "insufficient_quota" in body:
        return Trouble("fatal", refusal(address, 402, said, body))
    if status in PASSING or status >= 500:
        wait_s = asked_wait_s(headers, body)
        limited = status == TOO_MANY and wait_s > 0
        return Trouble("later" if limited else "again", said, wait_s, overload=status in OVERLOAD)
    if status in ABOUT_THE_REQUEST and (proven or status == 413 or ONE_PROMPT.search(body)):
        return Trouble("refused", said)
    if 300 <= status < 400:
        said = f"{status}, moved to {shown(address, headers.get('location', '?'))}"
    return Trouble("fatal", refusal(address, status, said, body))


STATUS_WORDS = {400: "Bad Request", 401: "Unauthorized", 402: "Payment Required", 403: "Forbidden", 404: "Not Found"}
"""For servers that answer without a word."""


def refusal(address: Address, status: int, said: str, body: str) -> str:
    """The error of a server that cannot be asked at all, with its remedy."""
    key = f"the key in {address.key_env}" if address.key else "no key"
    remedy = {
        401: f"it was sent {key}; set {address.key_env} to a valid one",
        402: f"add credit to the account of {key}",
        403: f"{key} may not use model {address.model!r} here; check teacher.model and the account's permissions",
        404: f"check its base_url (up to /v1) and that the server has the model {address.model!r}",
    }.get(status) or remedy_for_parameter(body)
    return f"{address} refused the request ({said}): {remedy}"


def remedy_for_parameter(body: str) -> str:
    """What to do about a parameter that the server names."""
    for name, remedy in REMEDIES_BY_PARAMETER.items():
        if re.search(rf"\b{name}\b", body) and NOT_TAKEN.search(body):
            return remedy
    return "check teacher.model, teacher.sampling and the endpoint"


def server_message(body: str) -> str:
    """What the server says went wrong, in one line; empty if it says nothing."""
    try:
        found: Any = json.loads(body)
    except ValueError:
        found = body
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return " ".join(str(found).split())


def shown(address: Address, text: str) -> str:
    """A server's text, cut short only after the key was cut out, so that no part of one is left."""
    return address.clean(text)[:SHOWN_CHARS]


def as_error(trouble: Trouble) -> EngineError:
    """Fatal trouble as what stops a run."""
    return EngineError(trouble.said)
