"""The artifact's tokenizer and chat template without transformers: prompts as they were rendered in training.

Only `tokenizers` and `jinja2` are needed. The template runs in jinja's immutable sandbox, with the filters, functions
and tags that transformers gives templates.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from distill.errors import MissingExtraError, ModelError

TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Chat:
    """The tokenizer and template of a folder; raises ModelError if either cannot be used."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = _read_tokenizer(folder)
        config = _read_json(folder / "tokenizer_config.json")
        self._special = {name: _content(config[name]) for name in SPECIAL_TOKENS if config.get(name) is not None}
        self._template = _compile(_read_template(folder, config), folder)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that the model continues; raises ModelError where the template refuses the messages."""
        try:
            plain = json.loads(json.dumps(messages))
            text = self._template.render(
                messages=plain, add_generation_prompt=True, tools=None, documents=None, **self._special
            )
        except Exception as error:  # templates raise jinja's own tree, and whatever their expressions meet
            raise ModelError(f"the chat template cannot render these messages: {error}") from error
        return str(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt: no special token is added, special tokens in the text are read as such."""
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except (UnicodeEncodeError, TypeError) as error:  # half a surrogate pair, which JSON can carry
            raise ModelError(
                "the text holds half a character (a lone surrogate), which no tokenizer can read"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens, as evaluation decodes."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _read_tokenizer(folder: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError("tokenizers", "export") from error
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{path}: cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    return value


def _content(token: Any) -> str:
    """A special token, which is text or a record that holds it."""
    return str(token["content"] if isinstance(token, dict) else token)


def _read_template(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if isinstance(template := config.get("chat_template"), str):
        return template
    raise ModelError(f"{folder}: has no chat template ({TEMPLATE_FILE} or tokenizer_config.json); export it with one")


def _compile(source: str, folder: Path) -> Any:
    try:
        from jinja2 import TemplateSyntaxError, nodes
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingExtraError("jinja2", "export") from error

    class Generation(Extension):
        """`{% generation %}` marks answers for training; in a prompt it stands for what is inside it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            """The statements inside, as they are."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=refuse, strftime_now=lambda shape: datetime.now().strftime(shape))
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ModelError(f"{folder}: its chat template is not valid: {error}") from error


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes what HTML could mistake for markup."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
