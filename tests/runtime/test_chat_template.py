"""Chat templates: rendered as transformers does, and kept in their sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiny_decoders import save_byte_tokenizer
from transformers import AutoTokenizer

from onnxpress.errors import ArtifactError, InputError
from onnxpress.runtime import chat_template
from onnxpress.runtime.chat_template import ChatTemplate

CHATML = """{{ bos_token }}{% for message in messages %}
    {% if message['role'] not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role ' ~ message['role']) }}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{% endfor %}
{% if tools %}{{ tools | tojson(indent=2, sort_keys=true) }}{% generation %}!{% endgeneration %}{% endif %}
{% if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Ünïcode & <tags>? "}]


@pytest.mark.parametrize("variables", [{}, {"tools": [{"name": "ä", "n": 1}]}])
def test_the_prompt_is_the_one_that_transformers_makes(tmp_path: Path, variables: dict[str, Any]) -> None:
    save_byte_tokenizer(tmp_path, CHATML)
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, **variables
    )
    assert template.render(MESSAGES, variables=variables) == expected


@pytest.mark.parametrize(
    "named",
    [
        {"eot_token": "<|eot|>"},
        {"extra_special_tokens": {"eot_token": "<|eot|>"}},
        {"model_specific_special_tokens": {"eot_token": "<|eot|>"}},
    ],
)
def test_a_models_own_special_tokens_may_be_named(tmp_path: Path, named: dict[str, Any]) -> None:
    save_byte_tokenizer(tmp_path, "{{ messages[0].content }}{{ eot_token }}{{ mask_token }}")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | named | {"mask_token": "<mask>"}))
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "hi<|eot|><mask>"
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|eot|><mask>"


def test_a_template_in_the_tokenizers_config_is_found(tmp_path: Path) -> None:
    config = {"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "<s>hi"
    config |= {"bos_token": {}, "eos_token": 3}  # which are no tokens
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "hi"
    named = [{"name": ["tool_use"], "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "yes"
    assert template.render([{"role": "user", "content": "hi"}], variables={"tools": [{"name": "clock"}]}) == "yes"
    named = [{"name": "tool_use", "template": "{{ tools[0].name }}"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "yes"
    assert template.render([{"role": "user", "content": "hi"}], variables={"tools": None}) == "yes"
    assert template.render([{"role": "user", "content": "hi"}], variables={"tools": [{"name": "clock"}]}) == "clock"


def test_what_is_none_is_not_there_and_reasoning_has_all_of_its_names() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}|{{ m.reasoning_content }}|{{ m.thinking }}{% if m.tool_calls %}!{% endif %}{% endfor %}",
        {},
    )
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}], "reasoning": "hm"},
        {"role": "user", "content": "so?", "tool_calls": None},
    ]
    assert template.render(messages) == "|hm|hm!so?||"
    assert messages[0]["content"] is None


_EACH = "{% for m in messages %}{{ m.role }}:CONTENT;{% endfor %}"
_STRING = "[{{ m.content }}]"
_LIST = "{% for part in m.content if part.type == 'text' %}[{{ part.text }}]{% endfor %}"
_EITHER = f"{{% if m.content is string %}}{_STRING} {{% else %}}{_LIST}{{% endif %}}"
_BY_ROLE = f"{{% if m.role == 'user' %}}{_LIST}{{% else %}}{_STRING}{{% endif %}}"
_SYSTEM_FIRST = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    ("source", "brief", "said"),
    [
        (_EACH.replace("CONTENT", _LIST), "[brief]", "[one][two]"),
        (_EACH.replace("CONTENT", _STRING), "[brief]", "[one\ntwo]"),
        (_EACH.replace("CONTENT", _STRING.replace("m.", "'' + m.")), "[brief]", "[one\ntwo]"),
        (_EACH.replace("CONTENT", _EITHER), "[brief] ", "[one][two]"),
        (_EACH.replace("CONTENT", _BY_ROLE), "[brief]", "[one][two]"),
        (_SYSTEM_FIRST + _EACH.replace("CONTENT", _LIST), "[brief]", "[one][two]"),
        ("{{ '' ~ style[0] }}" + _EACH.replace("CONTENT", _LIST), "[brief]", "[one][two]"),
        (_EACH.replace("CONTENT", _LIST.replace("part.text", "part.text | upper")), "[BRIEF]", "[ONE][TWO]"),
    ],
    ids=["list", "string", "only-string", "either", "by-role", "system-first", "variable", "upper"],
)
def test_content_comes_in_the_form_that_the_template_reads(source: str, brief: str, said: str) -> None:
    template = ChatTemplate(source, {})
    parts: list[Any] = [{"type": "text", "text": "one"}, {"text": "two"}]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "brief"}, {"role": "user", "content": parts}]
    prompt = template.render(messages, variables={"style": "x"})
    assert prompt.removeprefix("x") == f"system:{brief};user:{said};"
    assert messages[1]["content"] is parts


def test_what_a_prompt_says_by_itself_does_not_hide_what_is_read() -> None:
    template = ChatTemplate("<|message|>{{ tools | tojson }}" + _EACH.replace("CONTENT", _LIST), {})
    tools: list[Any] = [{"name": "send_message", "parameters": {"type": "text", "text": "message"}}]
    for variables in ({"tools": tools}, {}):
        assert template.render([{"role": "user", "content": "hi"}], variables=variables).endswith("user:[hi];")


def test_every_turn_is_read_where_a_system_message_has_to_be_first() -> None:
    template = ChatTemplate(_SYSTEM_FIRST + _EACH.replace("CONTENT", _LIST), {})
    roles = ("system", "user", "assistant", "tool", "somebody", "user")
    prompt = template.render([{"role": role, "content": role[0]} for role in roles])
    assert prompt == "".join(f"{role}:[{role[0]}];" for role in roles)


@pytest.mark.parametrize("data", [{"filename": "a.txt"}, {"image_count": 3}, {"file": "a"}, {"text": "a", "score": 1}])
def test_what_a_tool_answers_is_handed_on(data: dict[str, Any]) -> None:
    template = ChatTemplate("{{ messages[1].content | tojson }}", {})
    messages: list[dict[str, Any]] = [{"role": "user", "content": "?"}, {"role": "tool", "content": [data]}]
    assert json.loads(template.render(messages)) == [data]


def test_tools_have_their_own_templates_form() -> None:
    list_reader, string_reader = (_EACH.replace("CONTENT", content) for content in (_LIST, _STRING))
    for default, other in ((list_reader, string_reader), (string_reader, list_reader)):
        template = ChatTemplate(default, {}, for_tools=other)
        for tools in (None, [{"name": "clock"}]):
            assert template.render([{"role": "user", "content": "hi"}], variables={"tools": tools}) == "user:[hi];"


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "cat.png"}}, {"image": "cat.png"}, {"type": "Input_Audio"}]
)
def test_what_is_to_be_seen_or_heard_is_refused(part: dict[str, Any]) -> None:
    template = ChatTemplate(_EACH.replace("CONTENT", _LIST), {})
    message: dict[str, Any] = {"role": "user", "content": ({"type": "text", "text": "see"}, part)}
    with pytest.raises(InputError, match=r"^Message 0 has a part with '.*'; of messages, the text alone is read here"):
        template.render([message])


def test_content_that_is_no_text_at_all_goes_to_the_template_as_it_is() -> None:
    template = ChatTemplate("{{ messages[0].content[0].thinking }}{{ messages[1].content.x }}", {})
    thought: list[Any] = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "so"}]
    assert template.render([{"role": "user", "content": thought}, {"role": "tool", "content": {"x": 3}}]) == "hm3"


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None
    save_byte_tokenizer(tmp_path)
    assert ChatTemplate.from_folder(tmp_path) is None


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('id') }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(InputError, match="chat template"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) if n else 0 }}{{ f(n - 1) if n else 0 }}{{ f(n - 1) if n else 0 }}{% endmacro %}{{ f(50) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "{{ 'a' * 999999999999 }}",
        "{{ 999999999 * [1, 2] }}",
        "{{ (10 ** 10) ** 99999999 }}",
    ],
)
def test_a_template_ends(source: str) -> None:
    with pytest.raises(InputError, match=r"leave its sandbox|recursion"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{% set x = namespace(v='ab') %}{% for i in range(24) %}{% set x.v = x.v ~ x.v %}{% endfor %}",
        "{% set x = namespace(v='ab') %}{% for i in range(24) %}{% set x.v = x.v + x.v %}{% endfor %}",
        "{% set x = namespace(v=[1]) %}{% for i in range(24) %}{% set x.v = x.v + x.v %}{% endfor %}",
        "{% set x = namespace(v=9) %}{% for i in range(24) %}{% set x.v = x.v * x.v %}{% endfor %}",
        "{{ 'a' * 600 }}{{ 'a' * 600 }}",
        "{% set x %}{% for i in range(90) %}{{ 'a' * 90 }}{% endfor %}{% endset %}",
        "{% macro f() %}{% for i in range(90) %}" + "a" * 90 + "{% endfor %}{% endmacro %}{% set x = f() %}",
        "{% filter upper %}{% for i in range(90) %}{{ 'a' * 90 }}{% endfor %}{% endfilter %}",
    ],
)
def test_what_operators_and_texts_make_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_LONGEST", 1000)
    with pytest.raises(InputError, match=r"larger than 1000|more than 1000 characters"):
        ChatTemplate(source, {}).render(MESSAGES)


def test_large_numbers_are_not_large_texts() -> None:
    source = "{{ t }} {{ [t] | tojson }} {{ '%d' % t }} {{ '{}'.format(t) }} {{ t * 3 }} {{ t ~ none ~ 1.5 }} {{ no | default(t) }}"
    assert ChatTemplate(source, {}).render(MESSAGES, variables={"t": 1700000000}) == (
        "1700000000 [1700000000] 1700000000 1700000000 5100000000 1700000000None1.5 1700000000"
    )


def test_loops_and_products_are_as_ever() -> None:
    source = (
        "{% for a in [3, 1, 2] | sort if a > 1 %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ a * 2 }}{{ 'x' * a }}{% else %}none"
        "{% endfor %}{% for k, v in {'p': 1}.items() %}{{ k }}{{ v ** 3 }}{{ 2.0 ** 0.5 }}{% endfor %}{% for a in [] %}{% else %}none{% endfor %}"
        "{% for a in nowhere %}{% endfor %}"
    )
    expected = ImmutableSandboxedEnvironment().from_string(source).render()
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "x"}]) == expected
    with pytest.raises(ArtifactError, match="recursive loops are not taken"):
        ChatTemplate("{% for a in [[1]] recursive %}{{ loop(a) }}{% endfor %}", {})


def test_errors_are_in_plain_words() -> None:
    template = ChatTemplate(CHATML, {"bos_token": "<s>"})
    for variables in ({"messages": []}, {"self": 1}, {"add_generation_prompt": False}):
        with pytest.raises(InputError, match="cannot set"):
            template.render(MESSAGES, variables=variables)
    with pytest.raises(InputError, match="unknown role judge"):
        template.render([{"role": "judge", "content": "x"}])
    with pytest.raises(ArtifactError, match="not valid"):
        ChatTemplate("{% for %}", {})
    for messages in ("text", [], [{"content": "x"}], [{"role": "user"}], [3]):
        with pytest.raises(InputError, match=r"[Mm]essage"):
            template.render(messages)
