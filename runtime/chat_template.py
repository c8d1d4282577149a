"""Renders messages into a prompt by the model's own chat template, in jinja2's sandbox.

A template is a file from strangers: it cannot reach Python's internals, change what it is given, or read files, and its loops and calls,
what its operators make, and the text that it writes are bounded. (Methods and filters are not: one that pads or joins can take memory.)
What templates may use is what transformers gives them: raise_exception, strftime_now, tojson, break and continue.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from onnxpress.errors import ArtifactError, InputError
from onnxpress.manifest import Json

FILES = _FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_OWN_TOKENS = ("extra_special_tokens", "model_specific_special_tokens")  # a model's own, by name
_PROBE = "zq7vxk"  # what is said to see how a template reads it, and nobody says
_PRINTED = re.compile(rf"""['"]type['"]: ?['"]text['"],\s*['"]text['"]: ?['"]{_PROBE}['"]""", re.IGNORECASE)
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_SEEN_OR_HEARD = ("image", "video", "audio")  # how types of parts begin, and, without a type, what is in them
_TEXT = ("text", "input_text", "output_text")
_RESERVED = frozenset({"messages", "add_generation_prompt", "self", "raise_exception", "strftime_now"})
_REASONING = ("reasoning_content", "thinking", "reasoning")
_LONGEST = 10_000_000  # characters, items, or bits of a number
_MOST_TURNS = 1_000_000  # of all loops and calls of one rendering
_TURNS: ContextVar[Iterator[int]] = ContextVar("turns")


class ChatTemplate:
    """A template and the special tokens that it may name. for_tools: another, for calls with tools. Raises ArtifactError where one is not valid."""

    def __init__(self, source: str, tokens: Mapping[str, str], *, for_tools: str | None = None) -> None:
        import jinja2

        environment = _environment()
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        self._tokens = dict(tokens)
        self._forms: dict[tuple[Any, str], frozenset[type]] = {}
        try:
            self._template = environment.from_string(source)
            self._for_tools = self._template if for_tools is None else environment.from_string(for_tools)
        except jinja2.TemplateError as error:
            raise ArtifactError(f"The chat template is not valid: {error}.") from None

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder; None where it has none. Raises ArtifactError."""
        names = (name for name in (_CONFIG, _FILE) if (folder / name).is_file())
        return cls.from_files({name: (folder / name).read_bytes() for name in names}, where=folder)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes | bytearray], *, where: Path) -> ChatTemplate | None:
        """The template in the contents of FILES, by name; None where they have none. Raises ArtifactError."""
        config: Any = {}
        try:
            if _CONFIG in files:
                config = json.loads(files[_CONFIG])
            source = config.get("chat_template")
            if _FILE in files:
                source = files[_FILE].decode()
        except (ValueError, RecursionError, AttributeError) as error:
            raise ArtifactError(f"{where / _CONFIG} or {_FILE} is not valid: {error}.") from None
        for_tools: Any = None
        if isinstance(source, list):  # several, by name
            named = {str(item.get("name")): item.get("template") for item in source if isinstance(item, dict)}
            source, for_tools = named.get("default"), named.get("tool_use")
        if not isinstance(source, str):
            return None
        given = {name: token for name, token in config.items() if name.endswith("_token")}
        for own in (config.get(name) for name in _OWN_TOKENS):
            given |= own if isinstance(own, dict) else {}
        tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in given.items()}
        named_tokens = {name: token for name, token in tokens.items() if isinstance(token, str)}
        return cls(source, named_tokens, for_tools=for_tools if isinstance(for_tools, str) else None)

    def render(
        self,
        messages: Sequence[Mapping[str, Json]],
        *,
        variables: Mapping[str, Json] | None = None,
    ) -> str:
        """The prompt for messages ({"role": …, "content": …} each), after which it is the model's turn. Raises InputError.

        variables: further ones that the template knows, tools for instance.
        """
        import jinja2

        check_messages(messages)
        variables = {} if variables is None else variables
        if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
            raise InputError("template_variables takes values by name.")
        if taken := sorted(set(variables) & _RESERVED):
            raise InputError(f"template_variables cannot set {taken[0]!r}, which is the template's own.")
        _TURNS.set(itertools.count(1))  # of the finding out, too
        template = self._template if variables.get("tools") is None else self._for_tools
        known = [_as_templates_know_it(message) for message in messages]
        forms: dict[str, frozenset[type]] = {}
        for index, message in enumerate(known):
            content, role = _texts(index, message.get("content")), str(message["role"])
            if content is None:
                continue
            if role not in forms:  # as the user's, where nothing is found out
                forms[role] = self._read_forms(template, role, variables) or self._read_forms(
                    template, "user", variables
                )
            message["content"] = content if type(content) in forms[role] or not forms[role] else _other_form(content)
        try:
            return self._written(template, known, variables)
        except jinja2.exceptions.SecurityError as error:
            raise InputError(f"The chat template tries to leave its sandbox, and was stopped: {error}.") from None
        except Exception as error:  # a template may fail in any way a program may
            raise InputError(f"The chat template refuses these messages: {error}") from None

    def _written(self, template: Any, messages: Sequence[Mapping[str, Json]], variables: Mapping[str, Json]) -> str:
        given = {"tools": None, "documents": None, **variables, "messages": messages, "add_generation_prompt": True}
        text: str = template.render({**self._tokens, **given})
        return text

    def _read_forms(self, template: Any, role: str, variables: Mapping[str, Json]) -> frozenset[type]:
        """Of str and list, which content of a role is written: found by trying both, in a few conversations, and remembered."""
        if (template, role) in self._forms:
            return self._forms[template, role]
        found: set[type] = set()
        for others in ("other", _parts("other")):
            system, user = ({"role": name, "content": others} for name in ("system", "user"))
            for content in (_PROBE, _parts(_PROBE)):
                said = {"role": role, "content": content}
                tries = [[said]] if role == "user" else [[said, user], [user, said, user], [user, said]]
                tries += [[system, *messages] for messages in tries]
                if any(self._tells(template, messages, variables) for messages in tries):
                    found.add(type(content))
            if found:
                break
        if found and role in _ROLES:
            self._forms[template, role] = frozenset(found)
        return frozenset(found)

    def _tells(self, template: Any, messages: Sequence[Mapping[str, Json]], variables: Mapping[str, Json]) -> bool:
        """Whether what these messages say is in the prompt, and not as a list is printed."""
        try:
            text = self._written(template, messages, variables)
        except Exception:  # a template may fail in any way a program may
            return False
        return _PROBE in text.casefold() and not _PRINTED.search(text)


def _parts(text: str) -> list[Json]:
    return [{"type": "text", "text": text}]


def _other_form(content: str | list[Json]) -> str | list[Json]:
    return _parts(content) if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _texts(index: int, content: Json) -> str | list[Json] | None:
    """A text, or a list of parts that all are texts, with their type; None for other content. Raises InputError where it is seen or heard."""
    if isinstance(content, str) or not isinstance(content, Sequence):
        return content if isinstance(content, str) else None
    parts = [part for part in content if isinstance(part, Mapping)]
    for part in parts:
        kind = part.get("type")
        if isinstance(kind, str):
            seen = kind if kind.lower().removeprefix("input_").startswith((*_SEEN_OR_HEARD, "file")) else None
        else:
            seen = next((name for name in part if name.removesuffix("_url") in _SEEN_OR_HEARD), None)
        if seen is not None:
            raise InputError(f"Message {index} has a part with {seen!r}; of messages, the text alone is read here.")
    texts = [
        {**part, "type": "text"}
        for part in parts
        if isinstance(part.get("text"), str) and (part["type"] in _TEXT if "type" in part else len(part) == 1)
    ]
    return texts if content and len(texts) == len(content) else None


def _as_templates_know_it(message: Mapping[str, Json]) -> dict[str, Json]:
    """As transformers hands a message on: nothing that is None (the content beside tool calls), and reasoning by all of its names."""
    said = {name: value for name, value in message.items() if value is not None}
    reasoning = next((said[name] for name in _REASONING if name in said), None)
    return said if reasoning is None else {"thinking": reasoning, **said, "reasoning_content": reasoning}


def check_messages(messages: Any) -> None:
    """Raise InputError for what is no list of messages."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError('Messages are a list that is not empty, of {"role": "user", "content": "…"}.')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f'Message {index} is {message!r}; expected is {{"role": "user", "content": "…"}}.')
        if "content" not in message and "tool_calls" not in message:
            raise InputError(f"Message {index} has no content.")


def _joined(parts: Iterable[str]) -> str:
    found, length = [], 0
    for part in parts:
        found.append(part)
        length += len(part)
        if length > _LONGEST:
            raise InputError(f"a text has more than {_LONGEST} characters")
    return "".join(found)


def _environment() -> Any:
    """jinja2's sandbox, in which loops, calls, operators and texts are bounded."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    def turn() -> None:
        if next(_TURNS.get()) > _MOST_TURNS:
            raise SecurityError(f"more than {_MOST_TURNS} turns of loops and calls")

    def counted(items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            turn()
            yield item

    class Bounded(NodeTransformer):
        """Loops are counted, and what `~` joins is joined as all text is."""

        def visit_For(self, node: Any) -> Any:  # noqa: N802  as jinja2 calls it
            if node.recursive:
                raise TemplateSyntaxError("recursive loops are not taken", node.lineno)
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "counted", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            parts = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(parts, "joined", [], [], None, None, lineno=node.lineno)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**"))
        concat = staticmethod(_joined)  # the prompt, and what blocks and macros give

        def call(self, /, *arguments: Any, **named: Any) -> Any:
            turn()
            return super().call(*arguments, **named)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sized = [one for one in (left, right) if hasattr(one, "__len__")]
            size = 0
            if operator == "+":
                size = sum(map(len, sized))
            elif isinstance(left, int) and isinstance(right, int):
                size = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            elif operator == "*" and sized:
                size = len(sized[0]) * (right if sized[0] is left else left)
            if size > _LONGEST:
                raise SecurityError(f"{operator} makes something larger than {_LONGEST}")
            return super().call_binop(context, operator, left, right)

        def _generate(self, source: Any, *arguments: Any, **named: Any) -> str:
            source = Bounded().visit(source)
            source.set_environment(self)
            code: str = super()._generate(source, *arguments, **named)
            return code

    environment: Any = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_blocks()]
    )
    environment.filters["counted"] = counted
    environment.filters["joined"] = lambda parts: _joined(map(str, parts))
    return environment


def _generation_blocks() -> Any:
    """{% generation %} … {% endgeneration %} marks answers for training; here its content is all that counts."""
    from jinja2.ext import Extension

    class GenerationBlocks(Extension):
        tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return GenerationBlocks


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise InputError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)  # local time, as people who ask for today's date mean it
