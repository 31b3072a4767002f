"""How long a server asks to be left alone, in the forms that servers use.

`Retry-After` in seconds or as a date, `retry-after-ms`, and the `x-ratelimit-remaining-*` / `x-ratelimit-reset-*`
pairs, whose resets come as durations (`6m0s`, `20ms`), seconds, Unix times in seconds or milliseconds, or dates.
"""

import json
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from multidict import CIMultiDict, istr

LONGEST_WAIT_S = 600.0
"""Longest pause that a server is granted at a time."""
UNIX_TIME = 1e9
"""Numbers from here on are a Unix time, not a number of seconds; a thousand times as much is one in milliseconds."""

DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:([\d.]+)s)?(?:([\d.]+)ms)?")
DURATION_PARTS_S = (86_400.0, 3600.0, 60.0, 1.0, 0.001)

RETRY_AFTER_MS, RETRY_AFTER = istr("retry-after-ms"), istr("retry-after")
ALLOWANCES = [
    (istr(f"x-ratelimit-remaining{kind}"), istr(f"x-ratelimit-reset{kind}")) for kind in ("-requests", "-tokens", "")
]
"""What is left and when it is full again; the pair without a kind is OpenRouter's."""


def asked_wait_s(headers: Mapping[str, str], body: str = "") -> float:
    """Seconds that a refusal asks to wait, at most LONGEST_WAIT_S; 0 where it does not say.

    OpenRouter repeats the headers of the server behind it in the body.
    """
    if given := headers.get(RETRY_AFTER_MS):
        return bounded(duration_s(f"{given}ms"))
    if given := headers.get(RETRY_AFTER):
        return bounded(duration_s(given))
    return used_up_s(headers) or used_up_s(headers_in_body(body))


def used_up_s(headers: Mapping[str, str]) -> float:
    """Seconds until an allowance that any answer says is used up is there again; 0 where none is."""
    wait_s = 0.0
    for remaining, reset in ALLOWANCES:
        if (left := headers.get(remaining)) is not None and left.strip() in ("0", "0.0"):
            wait_s = max(wait_s, bounded(duration_s(headers.get(reset, ""))))
    return wait_s


def headers_in_body(body: str) -> Mapping[str, str]:
    """`error.metadata.headers` of a JSON body; empty where there are none."""
    if "metadata" not in body:
        return {}
    try:
        found: Any = json.loads(body)
        for key in ("error", "metadata", "headers"):
            found = found[key]
        return CIMultiDict({str(name): str(value) for name, value in found.items()})
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def bounded(seconds: float | None) -> float:
    """What a server asks for, within reason."""
    return min(max(seconds or 0.0, 0.0), LONGEST_WAIT_S)


def duration_s(given: str) -> float | None:
    """Seconds from now that a header's value means; None for what is no duration."""
    given = given.strip()
    try:
        number = float(given)
    except ValueError:
        return _written_s(given)
    if number >= UNIX_TIME:
        return number / (1000 if number >= 1000 * UNIX_TIME else 1) - time.time()
    return number


def _written_s(given: str) -> float | None:
    """`1h2m3.5s`, a date as in mail or an ISO date."""
    try:
        if given and (match := DURATION.fullmatch(given)):
            return sum(float(part) * unit for part, unit in zip(match.groups(), DURATION_PARTS_S) if part)
        date = datetime.fromisoformat(given) if given[:4].isdigit() else parsedate_to_datetime(given)
        return (date - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):  # no date either, or one without a time zone
        return None
