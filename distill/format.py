"""Reasoning formats: parsing every dialect into fields, and rendering fields into the text a student learns.

Parsing never guesses silently: the state of the reasoning (closed, unclosed, absent, empty, multiple) is part of the
result. Rendering keeps one invariant: the ids a document starts with in training are the ids that inference sends,
because both are tok(template(messages, add_generation_prompt=True)); the completion is rendered from the fields and
tokenized apart. This module knows tokenizers by their interface only and loads nothing heavy.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from distill.config import FormatConfig
from distill.errors import FormatError, ModelError
from distill.records import Message, ThinkState

R1_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: <think>\\n' }}{% endif %}"
)
"""A plain template for bases without one: it opens the reasoning in the prompt, as R1's own does."""


class Parsed(NamedTuple):
    """A model's text as fields."""

    reasoning: str | None
    answer: str
    think: ThinkState


class Tokenizer(Protocol):
    """What rendering needs of a tokenizer (transformers' interface)."""

    chat_template: Any
    eos_token_id: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render messages."""

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        """Tokenize."""

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Text of token ids."""


# --- parsing --------------------------------------------------------------------------------------------------------

_WORD_DIALECT = re.compile(
    r"\A\s*think(?:ing)?\s*\n(?P<reasoning>.*?)\n\s*answer\s*\n(?P<answer>.*)\Z", re.DOTALL | re.IGNORECASE
)


def parse_completion(
    text: str, open_marker: str = "<think>", close_marker: str = "</think>", opened: bool = False, markers: bool = True
) -> Parsed:
    """Split one text into reasoning and answer.

    `opened` says that the prompt already held the opening marker, so text without a closing one is unclosed
    reasoning. The text is split on the *last* closing marker; an opening one is optional. `think` / `answer` words on
    lines of their own are read too. `markers=False` takes the whole text as the answer.
    """
    if not markers:
        return Parsed(None, text.strip(), "absent")
    head, close, tail = text.rpartition(close_marker)
    if not close:
        return _without_close(text, open_marker, opened)
    inner = _inside(head, open_marker, opened)
    if close_marker in inner:
        state: ThinkState = "multiple"
    else:
        state = "closed" if inner.strip() else "empty"
    return Parsed(inner.strip(), tail.strip(), state)


def _inside(head: str, open_marker: str, opened: bool) -> str:
    """Reasoning in the text before the last closing marker."""
    before, opening, after = head.partition(open_marker)
    # what stands before an opening marker is no reasoning (an echoed prompt, a greeting), unless the prompt had
    # opened it already: then a later marker is only mentioned
    return after if opening and not (opened and before.strip()) else head


def _without_close(text: str, open_marker: str, opened: bool) -> Parsed:
    _, opening, after = text.partition(open_marker)
    if opening or opened:
        return Parsed((after if opening else text).strip(), "", "unclosed")
    if words := _WORD_DIALECT.match(text):
        reasoning = words["reasoning"].strip()
        return Parsed(reasoning, words["answer"].strip(), "closed" if reasoning else "empty")
    return Parsed(None, text.strip(), "absent")


def parse_fields(reasoning: str | None, content: str | None, **markers: Any) -> Parsed:
    """Read an answer whose reasoning came in a field of its own; falls back to markers inside the content."""
    if reasoning is None or not reasoning.strip():
        parsed = parse_completion(content or "", **markers)
        if reasoning is not None and parsed.think == "absent":
            return parsed._replace(think="empty", reasoning="")
        return parsed
    if not (content or "").strip():
        return Parsed(reasoning.strip(), "", "unclosed")
    return Parsed(reasoning.strip(), (content or "").strip(), "closed")


# --- rendering ------------------------------------------------------------------------------------------------------


def set_template(tokenizer: Tokenizer, config: FormatConfig) -> None:
    """Give a tokenizer the recipe's chat template, in place, so that it is saved with every checkpoint.

    Raises FormatError if there is none to keep or the file is missing.
    """
    if config.template == "r1":
        tokenizer.chat_template = R1_TEMPLATE
    elif config.template != "keep":
        try:
            tokenizer.chat_template = Path(config.template).read_text(encoding="utf-8")
        except OSError as error:
            raise FormatError(
                f"format.template: {config.template} cannot be read ({error.strerror});"
                " give `keep`, `r1` or a Jinja file"
            ) from error
    if not tokenizer.chat_template:
        raise FormatError(
            "format.template is `keep`, but the student's tokenizer has no chat template;"
            " set format.template=r1 or give a Jinja file"
        )


def with_system(messages: Sequence[Message], system: str | None) -> list[dict[str, str]]:
    """Messages as templates take them, the recipe's system prompt in front."""
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [{"role": m.role, "content": m.content} for m in messages]


def with_own_system(messages: Sequence[Message], system: str | None) -> Sequence[Message]:
    """Messages with a system prompt of the request's own in front, where it has one."""
    return messages if system is None else [Message(role="system", content=system), *messages]


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message], config: FormatConfig) -> str:
    """The text inference sends: the tokenizer's template with the generation prompt."""
    try:
        text = tokenizer.apply_chat_template(
            with_system(messages, config.system), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # jinja raises its own tree, templates raise theirs through it
        raise FormatError(f"the chat template cannot render these messages: {error}") from error
    return str(text)


def opens_reasoning(prompt_text: str, config: FormatConfig) -> bool:
    """Whether the prompt itself ends in the opening marker, as R1's templates do."""
    return prompt_text.rstrip().endswith(config.open_marker)


def render_completion(reasoning: str | None, answer: str, prompt_text: str, config: FormatConfig) -> str:
    """The text the student learns to write after the prompt, without the end token.

    `<think>\\n…\\n</think>\\n\\n…`; the opening marker is left out where the prompt already holds it.
    """
    if reasoning is None:
        if opens_reasoning(prompt_text, config):
            raise FormatError(
                "the template opens the reasoning, but this trace has none; use a template without the opening marker"
                " or select.reasoning: required"
            )
        return answer
    opening = "" if opens_reasoning(prompt_text, config) else f"{config.open_marker}\n"
    if opening == "" and not prompt_text.endswith("\n"):
        opening = "\n"
    return f"{opening}{reasoning}\n{config.close_marker}\n\n{answer}"


SEGMENTS = ("prompt", "think", "answer", "eos")
"""What a token of a document can be; the number of each is its index. Prompts are not supervised."""
PROMPT, THINK, ANSWER, EOS = range(4)
NO_OFFSETS = "the student's tokenizer cannot say where its tokens stand in a text; take a fast one (tokenizer.json)"


class Document(NamedTuple):
    """One training document in token ids."""

    ids: list[int]
    segments: bytes
    """What each token is, as indices of `SEGMENTS`."""
    seam_differs: bool
    """Whether tokenizing prompt and completion together gives other ids at the seam."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the first supervised one."""
        return len(self.segments) - len(self.segments.lstrip(bytes([PROMPT])))

    def text(self, tokenizer: Tokenizer, *kinds: int) -> str:
        """What the tokens of these segments say."""
        chosen = [token for token, kind in zip(self.ids, self.segments) if kind in kinds]
        return str(tokenizer.decode(chosen, skip_special_tokens=False))


class Turn(NamedTuple):
    """One supervised answer: the messages before it, and its fields."""

    messages: Sequence[Message]
    reasoning: str | None
    answer: str


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a rendered prompt; the template writes its own special tokens, so none are added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_document(
    tokenizer: Tokenizer, messages: Sequence[Message], reasoning: str | None, answer: str, config: FormatConfig
) -> Document:
    """tok(prompt) + tok(completion) + EOS, with the prefix invariant by construction.

    A token's segment follows from where its first character stands: reasoning ends with the closing marker. Raises
    FormatError where the tokenizer has no end token or cannot say where its tokens stand.
    """
    if tokenizer.eos_token_id is None:
        raise FormatError("the student's tokenizer has no end token (eos_token): a student could never learn to stop")
    prompt = render_prompt(tokenizer, messages, config)
    completion = render_completion(reasoning, answer, prompt, config)
    prompt_ids = encode_prompt(tokenizer, prompt)
    thought = len(completion) - len(answer) if reasoning is not None else 0
    completion_ids, kinds = _encode_completion(tokenizer, completion, completion[:thought].rstrip())
    seam = encode_prompt(tokenizer, prompt + completion) != prompt_ids + completion_ids
    ids = [*prompt_ids, *completion_ids, int(tokenizer.eos_token_id)]
    return Document(ids, bytes(len(prompt_ids)) + kinds + bytes([EOS]), seam)


def _encode_completion(tokenizer: Tokenizer, completion: str, thought: str) -> tuple[list[int], bytes]:
    """Ids of a completion and the segment of each; `thought` is its start, up to and with the closing marker."""
    try:
        encoded = tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]]
    except (NotImplementedError, KeyError) as error:
        raise FormatError(NO_OFFSETS) from error
    return list(encoded["input_ids"]), bytes(THINK if start < len(thought) else ANSWER for start in starts)


def encode_turns(tokenizer: Tokenizer, turns: Sequence[Turn], config: FormatConfig) -> list[Document]:
    """The supervised turns of one chat as few documents as the template allows.

    A later turn joins the document before it where what inference would send then begins with that document, id by id;
    a template that rewrites earlier turns (takes their reasoning out, say) makes it a document of its own. So every
    supervised turn stands behind exactly the prefix that inference sends.
    """
    documents: list[Document] = []
    for turn in turns:
        new = encode_document(tokenizer, turn.messages, turn.reasoning, turn.answer, config)
        last = documents[-1] if documents else None
        if last and new.prompt_tokens > len(last.ids) and new.ids[: len(last.ids)] == last.ids:
            segments = last.segments + new.segments[len(last.ids) :]
            documents[-1] = Document(new.ids, segments, last.seam_differs or new.seam_differs)
        else:
            documents.append(new)
    return documents


def check_round_trip(tokenizer: Tokenizer, document: Document, expected: str) -> None:
    """Refuse a tokenizer that does not give back the supervised text, end token included.

    Raises FormatError showing both texts around the first difference.
    """
    supervised = document.text(tokenizer, THINK, ANSWER)
    if supervised != expected:
        shorter = min(len(supervised), len(expected))
        at = next((i for i in range(shorter) if supervised[i] != expected[i]), shorter)
        raise FormatError(
            f"the tokenizer does not give back the training text: expected {expected[at : at + 40]!r},"
            f" decoded {supervised[at : at + 40]!r}; is this the model's own tokenizer?"
        )


def check_markers_survive(tokenizer: Tokenizer, config: FormatConfig) -> None:
    """Refuse a tokenizer that loses the reasoning markers when text is decoded for people.

    One that holds them as *special* tokens drops them with `skip_special_tokens=True`, as most programs decode: the
    student's reasoning would merge with its answer. Raises ModelError with the remedy.
    """
    ids = encode_prompt(tokenizer, f"{config.open_marker}a{config.close_marker}b")
    for skip in (False, True):
        if config.close_marker not in tokenizer.decode(ids, skip_special_tokens=skip):
            why = "holds it as a special token, which decoding skips" if skip else "cannot write it"
            raise ModelError(
                f"format.close_marker {config.close_marker!r}: the student's tokenizer {why};"
                " set other markers in format, or mark the token as not special in its tokenizer.json"
            )
