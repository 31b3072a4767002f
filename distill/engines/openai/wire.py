"""What is sent and what a good answer looks like: bodies in, fields out; nothing here talks to anybody.

Reasoning is read from `reasoning_content`, from `reasoning` (or OpenRouter's `reasoning_details`), or from markers in
the content, with or without the opening one. What we do not read is ignored, whatever it is.
"""

import json
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from distill.config import FormatConfig
from distill.engines import Completion, Request
from distill.format import parse_fields, with_system
from distill.records import FinishReason, Usage

from .address import Address
from .trouble import Trouble

FINISH: dict[str | None, FinishReason] = {
    "stop": "stop", "eos": "stop", "end_turn": "stop", "stop_sequence": "stop", "length": "length",
    "max_tokens": "length",
}  # fmt: skip
"""Servers' words for why an answer ended; any other is `unknown`."""
TO_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
BROKEN_OFF = {"error", "insufficient_system_resource"}
"""Words for an answer that the server could not finish."""


class BrokenAnswerError(Exception):
    """A body that is no whole answer; asking again may help."""


class ErrorInBodyError(Exception):
    """An error object where an answer should be, as gateways send once they have said 200."""

    def __init__(self, error: Any) -> None:
        super().__init__("an error in the body")
        code = error.get("code") if isinstance(error, dict) else None
        self.status = int(code) if isinstance(code, int) or (isinstance(code, str) and code.isdecimal()) else 0
        """The status it stands for; 0 where it does not say."""
        self.body = json.dumps({"error": error}, ensure_ascii=False)


# --- what is sent ---------------------------------------------------------------------------------------------------


def request_body(model: str, request: Request, stream: bool) -> bytes:
    """The JSON of one request."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": with_system(request.prompt.messages, request.system),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": request.seed,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return TO_JSON(body).encode()


def chars_of(request: Request) -> int:
    """Characters of a request's text, for estimates."""
    return len(request.system or "") + sum(len(message.content) for message in request.prompt.messages)


# --- what comes back ------------------------------------------------------------------------------------------------


class TokenDetails(BaseModel):
    """Parts of the output tokens."""

    reasoning_tokens: int | None = None


class TokenUsage(BaseModel):
    """Tokens as the server counted them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    completion_tokens_details: TokenDetails | None = None


class ChatMessage(BaseModel):
    """The answer, or a piece of it; servers call the field of the reasoning by several names."""

    content: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    reasoning_details: Any = None

    @property
    def thought(self) -> str | None:
        """The reasoning, from the first field that holds text; empty where a field is there but holds none."""
        for given in (self.reasoning_content, self.reasoning):
            if isinstance(given, str):
                return given
        if isinstance(self.reasoning_details, list):
            parts = [part.get("text") for part in self.reasoning_details if isinstance(part, dict)]
            return "".join(part for part in parts if isinstance(part, str)) or None
        return None


class Choice(BaseModel):
    """One sample."""

    message: ChatMessage
    finish_reason: str | None = None


class ChatCompletion(BaseModel):
    """The body of an answer."""

    choices: list[Choice] = []
    usage: TokenUsage | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    error: Any = None


class Answer(NamedTuple):
    """A whole answer as the server gave it, in one piece or in many."""

    reasoning: str | None
    content: str
    finish: str | None
    usage: TokenUsage | None = None
    model: str | None = None
    fingerprint: str | None = None


def whole_answer(body: bytes) -> Answer:
    """Read a body that came in one piece; blank lines before it are keep-alives.

    Raises BrokenAnswerError or ErrorInBodyError.
    """
    try:
        read = ChatCompletion.model_validate_json(body)
    except ValidationError:
        raise BrokenAnswerError(f"not a chat completion: {body.decode(errors='replace').strip()!r}") from None
    if read.error is not None and not (read.choices and read.choices[0].message.content):
        raise ErrorInBodyError(read.error)
    if not read.choices:
        raise BrokenAnswerError("an answer without choices")
    message, finish = read.choices[0].message, read.choices[0].finish_reason
    return Answer(message.thought, message.content or "", finish, read.usage, read.model, read.system_fingerprint)


def completion_of(request: Request, answer: Answer, address: Address, format: FormatConfig) -> Completion | Trouble:
    """The fields of an answer, or why one that looks good is none."""
    usage = usage_of(answer.usage)
    content = address.clean(answer.content)
    reasoning = None if answer.reasoning is None else address.clean(answer.reasoning)
    if answer.finish == "content_filter":
        return Trouble("refused", "the server's content filter cut the answer off")
    if answer.finish in BROKEN_OFF or not (content or reasoning or usage.output):
        return Trouble("again", f"an empty answer (finish_reason {answer.finish})")
    parsed = parse_fields(reasoning, content, open_marker=format.open_marker, close_marker=format.close_marker)
    return Completion(
        key=request.key,
        reasoning=parsed.reasoning,
        answer=parsed.answer,
        raw=rejoined(reasoning, content, format),
        think=parsed.think,
        finish_reason=FINISH.get(answer.finish, "unknown"),
        usage=usage,
        model=answer.model and address.clean(answer.model),
        revision=answer.fingerprint and address.clean(answer.fingerprint),
    )


def usage_of(usage: TokenUsage | None) -> Usage:
    """The server's counts as ours; zeros where it gives none."""
    if usage is None:
        return Usage()
    details = usage.completion_tokens_details
    return Usage(
        input=usage.prompt_tokens or 0,
        output=usage.completion_tokens or 0,
        reasoning=details.reasoning_tokens if details else None,
    )


def rejoined(reasoning: str | None, content: str, format: FormatConfig) -> str:
    """The text a model would have written in one piece: reasoning of a separate field between the markers."""
    if not reasoning:
        return content
    closed = f"\n{format.close_marker}\n\n{content}" if content.strip() else ""
    return f"{format.open_marker}\n{reasoning}{closed}"
