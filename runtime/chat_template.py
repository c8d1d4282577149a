"""Renders messages into a prompt by the model's own chat template, in jinja2's sandbox.

A template is a file from strangers: it cannot reach Python's internals, change what it is given, or read files. What
templates may use is what transformers gives them: raise_exception, strftime_now, tojson, break and continue.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxpress.errors import ArtifactError, InputError
from onnxpress.manifest import Json

_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_LONGEST = 10_000_000  # characters


class ChatTemplate:
    """A template and the special tokens that it may name. Raises ArtifactError where it is not valid."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        self._tokens = dict(tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ArtifactError(f"The chat template is not valid: {error}.") from None

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate | None:
        """The template of an artifact or model folder; None where it has none. Raises ArtifactError."""
        config: Any = {}
        path = folder / _CONFIG
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ArtifactError(f"{path} is not valid JSON: {error}.") from None
        source = config.get("chat_template")
        if (folder / _FILE).is_file():
            source = (folder / _FILE).read_text(encoding="utf-8")
        if isinstance(source, list):  # several, by name
            named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            return None
        tokens = {name: config.get(name) for name in _TOKENS}
        return cls(
            source,
            {
                name: token["content"] if isinstance(token, dict) else token
                for name, token in tokens.items()
                if token is not None
            },
        )

    def render(self, messages: Sequence[Mapping[str, Json]], *, answer: bool = True, **variables: Any) -> str:
        """The prompt for messages ({"role": …, "content": …} each). answer: the model's turn follows. Raises InputError."""
        import jinja2

        check_messages(messages)
        try:
            text = self._template.render(
                **self._tokens,
                messages=[dict(message) for message in messages],
                add_generation_prompt=answer,
                **{"tools": None, "documents": None, **variables},
            )
        except jinja2.exceptions.SecurityError as error:
            raise InputError(f"The chat template tries to leave its sandbox, and was stopped: {error}.") from None
        except Exception as error:  # a template may fail in any way a program may
            raise InputError(f"The chat template refuses these messages: {error}") from None
        if len(text) > _LONGEST:
            raise InputError(f"The chat template made a prompt of {len(text)} characters; {_LONGEST} are allowed.")
        return text


def check_messages(messages: Any) -> None:
    """Raise InputError for what is no list of messages."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError('Messages are a list that is not empty, of {"role": "user", "content": "…"}.')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f'Message {index} is {message!r}; expected is {{"role": "user", "content": "…"}}.')
        if "content" not in message and "tool_calls" not in message:
            raise InputError(f"Message {index} has no content.")


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise InputError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)  # local time, as people who ask for today's date mean it
