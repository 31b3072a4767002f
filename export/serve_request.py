"""The body of a chat completion: what a client may ask, and what it is told where it asks for anything else.

As OpenAI's own servers do: unknown fields are refused by name, so that a misspelled one is noticed; fields that change
no text are taken and left alone; fields that would, and that a local student cannot honour, are refused.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none", "auto"),
    "functions": ([],), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "frequency_penalty": (0,), "presence_penalty": (0,), "modalities": (["text"],), "audio": (), "prediction": (),
    "web_search_options": (),
}  # fmt: skip
"""Fields that cannot be honoured, with the values (besides null) that ask for nothing."""
LEFT_ALONE = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
)
"""Fields that change no text here."""


class ApiError(Exception):
    """An answer that is an error, as OpenAI's servers write it."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        kind: str = "invalid_request_error",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.kind = status, code, param, kind
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class TextPart(_Part):
    """A part of a message; only text can be read."""

    type: Literal["text"]
    text: str


class ChatMessage(_Part):
    """One message of the chat so far."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    """Left out of the prompt: templates take answers without their reasoning."""
    refusal: None = None
    tool_calls: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def plain(self) -> dict[str, str]:
        """As templates take it."""
        parts = [part.text for part in self.content] if isinstance(self.content, list) else [self.content or ""]
        return {"role": "system" if self.role == "developer" else self.role, "content": "".join(parts)}


class StreamOptions(_Part):
    """What a stream has besides text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_Part):
    """What is asked."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    stop: str | list[str] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    think_budget: Annotated[int, Field(ge=0)] | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 16 or any(not 0 < len(stop) <= 256 for stop in stops):
            raise ValueError("at most 16 stop sequences of 1 to 256 characters")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop sequences."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def parse_chat(body: bytes) -> ChatRequest:
    """The request in a body; raises ApiError (400) that says which field is wrong and how."""
    try:
        given = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", "invalid_json") from error
    if not isinstance(given, dict):
        raise ApiError(400, f"the body is {type(given).__name__}; a JSON object is needed", "invalid_json")
    for name, neutral in NEUTRAL.items():
        if given.pop(name, None) not in (None, *neutral):
            raise ApiError(400, f"{name} is not supported by this server; leave it out", "unsupported_parameter", name)
    try:
        return ChatRequest.model_validate({name: value for name, value in given.items() if name not in LEFT_ALONE})
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> ApiError:
    """The first thing that is wrong."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", "unknown_parameter", param)
    if first["type"] == "missing":
        return ApiError(400, f"you must provide {param}", "missing_required_parameter", param)
    given = "" if isinstance(first["input"], dict | list) else f" (given: {str(first['input'])[:80]!r})"
    return ApiError(400, f"{param}: {first['msg']}{given}", "invalid_value", param)
