"""Where a server is, what it calls the model, and the key it takes.

The key is read from the environment, goes into one header, and is cut out of everything the server says before
anybody sees it.
"""

import ipaddress
import os
import urllib.request
from dataclasses import dataclass, field
from typing import NamedTuple

from yarl import URL

from distill.config import Endpoint
from distill.errors import EngineError

SHORTEST_SECRET = 8
"""A shorter key (`EMPTY`, `none`) is a placeholder for a server without keys, and may well stand in an answer."""


@dataclass(frozen=True)
class ApiKey:
    """A key and the environment variable it came from; only the latter is ever shown."""

    env: str
    value: str = field(repr=False)

    def cut_from(self, text: str) -> str:
        """The text with the variable's name wherever the key stood."""
        return text.replace(self.value, f"<{self.env}>") if len(self.value) >= SHORTEST_SECRET else text


class Address(NamedTuple):
    """Where requests go and as whom."""

    url: URL
    """Up to and including `/v1`."""
    model: str
    key: ApiKey | None
    key_env: str
    """The variable that holds the key, or would."""

    def __str__(self) -> str:
        return str(self.url)

    def at(self, *path: str) -> URL:
        """The address of a resource, such as `chat`, `completions`."""
        return self.url.joinpath(*path)

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries; answers are small enough not to be packed."""
        bearer = {"Authorization": f"Bearer {self.key.value}"} if self.key else {}
        return {"Accept-Encoding": "identity", "Content-Type": "application/json", **bearer}

    @property
    def proxy(self) -> str | None:
        """The proxy that the environment names for this address; none can reach this machine's own servers."""
        host = self.url.host or ""
        if is_local(host) or urllib.request.proxy_bypass(host):
            return None
        return urllib.request.getproxies().get(self.url.scheme)

    def clean(self, text: str) -> str:
        """The text without the key."""
        return self.key.cut_from(text) if self.key else text


def address_of(endpoint: Endpoint, model: str, where: str) -> Address:
    """A recipe's endpoint, checked; `where` is its key in the recipe.

    Raises EngineError for an unusable address or a missing key.
    """
    url = checked_url(endpoint.base_url, f"{where}.base_url", f"{where}.api_key_env")
    key = key_from_environment(endpoint.api_key_env, url, f"{where}.api_key_env")
    return Address(url, endpoint.model or model, key, endpoint.api_key_env)


def checked_url(base_url: str, where: str, key_where: str) -> URL:
    """The endpoint's address. Raises EngineError if it is none, or holds something secret."""
    example = "give it like https://api.deepseek.com/v1"
    try:
        url = URL(base_url.rstrip("/"))
        _ = url.port
    except ValueError:
        raise EngineError(f"{where}: not an address; {example}") from None
    if url.user or url.password or url.query_string or url.fragment:
        raise EngineError(
            f"{where}: it carries a user, query or fragment; give the bare address up to /v1, and the key in the"
            f" environment variable that {key_where} names"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise EngineError(f"{where} is {base_url!r}; {example}")
    if url.path.endswith("/chat/completions"):
        raise EngineError(f"{where} is {base_url!r}; leave out /chat/completions, it is added")
    return url


def is_local(host: str) -> bool:
    """Whether a host is this machine or a private network, where servers need no key."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_private or address.is_loopback or address.is_unspecified


def key_from_environment(name: str, url: URL, where: str) -> ApiKey | None:
    """The key in the variable `name`; None where there is none and none is needed.

    Raises EngineError naming the variable, never its value.
    """
    value = os.environ.get(name, "").strip()
    if not value:
        if is_local(url.host or ""):
            return None
        raise EngineError(
            f"{url} needs a key: set the environment variable {name} (or name another one in {where});"
            " any text will do for a server that asks for none"
        )
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise EngineError(f"the environment variable {name} holds characters that no key has; set it again")
    return ApiKey(name, value)
