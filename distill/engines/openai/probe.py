"""Preflight over the network: one cheap request to each server, and its list of models where it gives one.

The request is the beginning of the longest prompt with a small limit of tokens: enough to see whether the key and the
model are right, the parameters are taken, the limit binds, and reasoning begins to come back. What would make the work
fail is an EngineError with its remedy; what it should not be surprised by is a note, which begins with its topic.
"""

import asyncio
import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp

from distill.config import FormatConfig
from distill.engines import Completion, Probe, Request
from distill.errors import EngineError
from distill.records import Message, Prompt, Usage

from .exchange import CONNECTION_ERRORS, HTTP_OK, ask, start_of
from .limits import CHARS_PER_TOKEN
from .pool import Server
from .trouble import Trouble
from .wire import chars_of

PROBE_TOKENS = 64
"""Output tokens of a probe: reasoning models reason from the first token on."""
PROBE_CHARS = 2000
"""How much of the longest prompt a probe sends."""
PROBE_TRIES = 3
LONGEST_PROBE_WAIT_S = 60.0
"""Longest wait between two tries of a probe."""
LARGEST_LIST = 8 * 1024 * 1024
"""Bytes of a list of models; gateways list hundreds."""
TIGHT = 0.9
"""Share of the context from which a longest prompt is worth a note."""
SENT_PARAMETERS = ("temperature", "top_p", "max_tokens", "seed")
HOSTED_REASONER = "deepseek-reasoner"
"""DeepSeek's hosted reasoning models: documented to take temperature and top_p without heeding them."""


class Listed(NamedTuple):
    """A model as a server lists it."""

    id: str
    context: int | None = None
    """Tokens of prompt and answer together."""
    longest_answer: int | None = None
    parameters: Sequence[str] | None = None
    """Parameters that it heeds, where the server says so."""


Delay = Callable[[int, float], float]


async def probe_all(
    session: aiohttp.ClientSession, servers: Sequence[Server], longest: Request, format: FormatConfig, delay_s: Delay
) -> Probe:
    """Probe every server at once. Raises EngineError for the first that could not do the work.

    A server that does not answer at all is a note while another one does.
    """
    probes = [probe_one(session, server, longest, format, delay_s) for server in servers]
    found = await asyncio.gather(*probes, return_exceptions=True)
    for error in found:
        if isinstance(error, BaseException) and not isinstance(error, SilentServerError):
            raise error
    silent = [error for error in found if isinstance(error, SilentServerError)]
    if len(silent) == len(servers):
        raise silent[0]
    return joined([probe for probe in found if isinstance(probe, Probe)], [f"down: {error}" for error in silent])


class SilentServerError(EngineError):
    """A server that gave no answer, for reasons that can pass."""


def joined(probes: Sequence[Probe], more: Sequence[str]) -> Probe:
    """All notes, and what all probes used."""
    usages = [probe.usage for probe in probes]
    reasoning = [usage.reasoning for usage in usages if usage.reasoning is not None]
    usage = Usage(
        input=sum(usage.input for usage in usages),
        output=sum(usage.output for usage in usages),
        reasoning=sum(reasoning) if reasoning else None,
    )
    return Probe(tuple(note for probe in probes for note in probe.notes) + tuple(more), usage)


async def probe_one(
    session: aiohttp.ClientSession, server: Server, longest: Request, format: FormatConfig, delay_s: Delay
) -> Probe:
    """Ask one server for its models and for the beginning of an answer. Raises EngineError with the remedy."""
    models = await list_models(session, server)
    request = beginning_of(longest)
    outcome = await ask_patiently(session, server, request, format, delay_s)
    if isinstance(outcome, Trouble):
        return Probe((note_or_error(server, outcome, models),))
    server.proven = True
    listed = next((model for model in models if model.id == server.address.model), None)
    if listed is None and len(models) == 1:
        listed = models[0]  # a server of one model answers to any name
    notes = [
        reasoning_note(server, outcome),
        max_tokens_note(server, request, outcome),
        ignored_note(server, listed),
        model_note(server, outcome, models),
        *context_notes(server, listed, longest, input_tokens(longest, request, outcome.usage)),
    ]
    return Probe(tuple(note for note in notes if note), outcome.usage)


async def ask_patiently(
    session: aiohttp.ClientSession, server: Server, request: Request, format: FormatConfig, delay_s: Delay
) -> Completion | Trouble:
    """The probe with its retries."""
    outcome = await ask(session, server, request, format)
    for attempt in range(1, PROBE_TRIES):
        if isinstance(outcome, Completion) or outcome.kind in ("fatal", "refused"):
            break
        await asyncio.sleep(delay_s(attempt, min(outcome.wait_s, LONGEST_PROBE_WAIT_S)))
        outcome = await ask(session, server, request, format)
    return outcome


def beginning_of(longest: Request) -> Request:
    """A short request like those of the run: same system prompt and sampling, little text in and out."""
    text = longest.prompt.text[:PROBE_CHARS]
    limit = min(PROBE_TOKENS, longest.sampling.max_new_tokens)
    return longest._replace(
        prompt=Prompt.of([Message(role="user", content=text)]),
        sampling=longest.sampling.model_copy(update={"max_new_tokens": limit}),
    )


# --- the list of models ---------------------------------------------------------------------------------------------


async def list_models(session: aiohttp.ClientSession, server: Server) -> list[Listed]:
    """What GET /models says; empty where a server does not answer it."""
    request = {"headers": server.headers, "timeout": server.timeout, "proxy": server.proxy, "allow_redirects": False}
    try:
        async with session.get(server.address.at("models"), **request) as response:  # type: ignore[arg-type]
            return models_in(await start_of(response, LARGEST_LIST)) if response.status == HTTP_OK else []
    except CONNECTION_ERRORS:
        return []  # the request that matters says what is wrong


def models_in(body: bytes) -> list[Listed]:
    """The models in a list as OpenAI's API gives it; what is no such list has none."""
    try:
        found: Any = json.loads(body)
    except ValueError:
        return []
    data = found.get("data") if isinstance(found, dict) else None
    models = data if isinstance(data, list) else []
    return [listed_model(model) for model in models if isinstance(model, dict) and isinstance(model.get("id"), str)]


def listed_model(model: Mapping[str, Any]) -> Listed:
    """One entry: vLLM and SGLang say `max_model_len`, OpenRouter `context_length`, llama.cpp `meta.n_ctx_train`."""
    provider, meta = (part if isinstance(part := model.get(key), dict) else {} for key in ("top_provider", "meta"))
    lengths = [
        model.get("max_model_len"), provider.get("context_length"), model.get("context_length"),
        meta.get("n_ctx"), meta.get("n_ctx_train"),
    ]  # fmt: skip
    parameters = model.get("supported_parameters")
    longest_answer = provider.get("max_completion_tokens")
    return Listed(
        id=model["id"],
        context=next((length for length in lengths if isinstance(length, int) and length > 0), None),
        longest_answer=longest_answer if isinstance(longest_answer, int) else None,
        parameters=parameters if isinstance(parameters, list) and parameters else None,
    )


def nearest(name: str, models: Sequence[Listed]) -> str:
    """What the server has instead of a model, as the end of a sentence."""
    ids = [model.id for model in models]
    close = difflib.get_close_matches(name, ids, n=3, cutoff=0.4) or ids[:3]
    return f"it lists {len(ids)}, nearest: {', '.join(close)}"


# --- findings -------------------------------------------------------------------------------------------------------


def note_or_error(server: Server, trouble: Trouble, models: Sequence[Listed]) -> str:
    """What a probe without an answer means. Raises EngineError unless it was the prompt that was refused."""
    if trouble.kind == "refused":
        return (
            f"refused: {server.address} would not answer the probe, the beginning of the longest prompt: {trouble.said}"
        )
    if trouble.kind == "fatal":
        missing = models and server.address.model not in [model.id for model in models]
        hint = f"; {server.address.model!r} is not among its models ({nearest(server.address.model, models)})"
        raise EngineError(trouble.said + (hint if missing else ""))
    raise SilentServerError(
        f"{server.address} did not answer a probe ({trouble.said}, tried {PROBE_TRIES} times); check that it is up and"
        " that base_url is right"
    )


def reasoning_note(server: Server, completion: Completion) -> str | None:
    """Reasoning that is paid for but not sent is lost to a student."""
    billed = completion.usage.reasoning or (0 if completion.raw else completion.usage.output)
    if not billed or completion.reasoning:
        return None
    return (
        f"reasoning: {server.address} bills reasoning ({billed} tokens in the probe) but does not send it; choose an"
        " endpoint that returns it (reasoning_content, reasoning or tags), or start the server without hiding it"
    )


def max_tokens_note(server: Server, request: Request, completion: Completion) -> str | None:
    """A limit that does not bind makes token budgets guesses."""
    asked, used = request.sampling.max_new_tokens, completion.usage.output
    if used <= asked:
        return None
    return (
        f"max_tokens: {server.address} was asked for at most {asked} tokens and billed {used}: it does not keep to it"
    )


def ignored_note(server: Server, listed: Listed | None) -> str | None:
    """Parameters that are taken and not heeded."""
    ignored: Sequence[str] = ()
    if HOSTED_REASONER in server.address.model:
        ignored = ("temperature", "top_p")
    elif listed is not None and listed.parameters is not None:
        ignored = [name for name in SENT_PARAMETERS if name not in listed.parameters]
    return f"ignored: {', '.join(ignored)} (by {server.address.model} at {server.address})" if ignored else None


def model_note(server: Server, completion: Completion, models: Sequence[Listed]) -> str | None:
    """Another model than the one asked for, as far as can be seen."""
    asked = server.address.model
    if completion.model and completion.model != asked:
        return f"model: {server.address} was asked for {asked!r} and says that {completion.model!r} answered"
    if models and asked not in [model.id for model in models]:
        return f"model: {server.address} answered as {asked!r} but does not list it ({nearest(asked, models)})"
    return None


class Estimate(NamedTuple):
    """Input tokens of the longest prompt, never counted but guessed from its length."""

    tokens: int
    basis: str
    surely: int
    """At least so many."""


def input_tokens(longest: Request, request: Request, usage: Usage) -> Estimate:
    """Scaled from the probe's own count where the server gives one."""
    chars = chars_of(longest)
    if usage.input:
        tokens = math.ceil(chars * usage.input / chars_of(request))
        return Estimate(tokens, "estimated from the probe's", tokens)
    tokens = math.ceil(chars / CHARS_PER_TOKEN)
    return Estimate(tokens, f"estimated at {CHARS_PER_TOKEN} characters each", tokens // 2)


def context_notes(server: Server, listed: Listed | None, longest: Request, prompt: Estimate) -> list[str]:
    """Whether the longest prompt and its answer fit. Raises EngineError if they surely do not."""
    if listed is None:
        return []
    most_new, notes = longest.sampling.max_new_tokens, []
    if listed.longest_answer is not None and listed.longest_answer < most_new:
        notes.append(
            f"context: {server.address} writes at most {listed.longest_answer} tokens an answer, not the {most_new} of"
            " teacher.sampling.max_new_tokens"
        )
    if listed.context is None:
        return notes
    sizes = (
        f"the longest prompt takes about {prompt.tokens} tokens ({prompt.basis}) and"
        f" teacher.sampling.max_new_tokens {most_new}, together {prompt.tokens + most_new}, of a context of"
        f" {listed.context} at {server.address}"
    )
    if prompt.surely + most_new > listed.context:
        raise EngineError(f"{sizes}: lower max_new_tokens, drop the longest prompts, or serve a longer context")
    if prompt.tokens + most_new > TIGHT * listed.context:
        notes.append(f"context: {sizes}: tight")
    return notes
