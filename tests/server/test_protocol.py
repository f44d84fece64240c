"""What a request may say: how a wrong value is reported, what counts as equal, and that hostile ones stay cheap."""

import json
import re
import time
from typing import Any

import pytest
from pydantic import BaseModel

from qvl_edge.options import GenerationOptions
from qvl_edge.server.fields import MAX_LOGGED, JsonSchema, ResponseFormat, Tolerant
from qvl_edge.server.guard import parse_json
from qvl_edge.server.messages import (
    AssistantMessage,
    Conversation,
    ImagePart,
    ImageURL,
    SystemMessage,
    TextPart,
    UserMessage,
)
from qvl_edge.server.protocol import ChatCompletionRequest, Limits, StreamOptions, request_model
from qvl_edge.server.refusal import Refusal

REQUEST = request_model("small", Limits())
ASKED: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "a"}]}


def read(**fields: Any) -> ChatCompletionRequest:
    return REQUEST.parse(parse_json(json.dumps({**ASKED, **fields}).encode()))


def refused(**fields: Any) -> Refusal:
    with pytest.raises(Refusal) as error:
        read(**fields)
    return error.value


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 2.5}, "temperature: Input should be less than or equal to 2, not 2.5"),
        ({"temperature": "hot"}, 'temperature: Input should be a valid number, not "hot"'),
        ({"temperature": 1e999}, None),
        ({"top_p": 0}, "top_p: Input should be greater than 0, not 0"),
        ({"max_tokens": 1.5}, "max_tokens: Input should be a valid integer, not 1.5"),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer, not true"),
        ({"max_tokens": 10**3000}, "max_tokens: Input should be less than or equal to 2147483647, not 1000"),
        ({"max_tokens": [1]}, "max_tokens: Input should be a valid integer, not a list"),
        ({"n": 9}, "n: Input should be less than or equal to 8, not 9"),
        ({"stop": ["a", ""]}, 'stop[1]: String should have at least 1 character, not ""'),
        ({"stop": ["a"] * 5}, "stop: List should have at most 4 items after validation, not 5"),
        ({"tools": [{}]}, "tools: this is not supported yet"),
        ({"temprature": 1}, "temprature: this field is not known"),
        ({"messages": 3}, "messages: Input should be a valid list, not 3"),
        ({"messages": [3]}, "messages[0]: expected an object, not 3"),
        ({"messages": [{}]}, "messages[0].role: Field required"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: Field required"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "messages[0].content: expected text or a list of parts, not 3",
        ),
        (
            {"messages": user({"type": "text", "text": 3})},
            "messages[0].content[0].text: Input should be a valid string",
        ),
        (
            {"messages": user({"type": "audio"})},
            "messages[0].content[0].type: expected one of 'text', 'image_url', not",
        ),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x: this field is not known"),
        ({"max_token": 1}, "max_token: this field is not known (did you mean max_tokens?)"),
        ({"logit_bias": {"secret": "x"}}, 'logit_bias: Input should be a valid number, not "x"'),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type: Input should be 'text', 'boxes', 'json_object', 'json_schema', ",
        ),
    ],
)
def test_a_refusal_names_the_field_what_is_expected_and_the_value(fields: dict[str, Any], message: str | None) -> None:
    if message is None:  # what JSON cannot write is no JSON
        assert refused(**fields).code == "invalid_json"
    else:
        assert str(refused(**fields)).startswith(message)


def test_an_image_in_a_system_message_is_named() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    refusal = refused(messages=[{"role": "system", "content": [image]}, *ASKED["messages"]])
    assert (refusal.param, refusal.status) == ("messages[0].content[0].type", 400)


@pytest.mark.parametrize("fields", [{"model": "x" * 99_999}, {"x" * 99_999: 1}, {"messages": [{"role": "x" * 99_999}]}])
def test_a_long_value_is_cut_in_the_message(fields: dict[str, Any]) -> None:
    assert len(str(refused(**fields))) < 200


def test_a_data_uri_in_the_wrong_place_is_not_repeated() -> None:
    uri = "data:image/png;base64," + "A" * 100 + "secret"
    refusal = refused(messages=user({"type": "image_url", "image_url": {"url": [uri]}}))
    assert refusal.param == "messages[0].content[0].image_url.url" and "secret" not in str(refusal)
    refusal = refused(messages=user({"type": "text", "text": {"url": uri}}))
    assert refusal.param == "messages[0].content[0].text" and "secret" not in str(refusal)


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": "\ud800"},
        {"model": "\ud800"},
        {"user": "\udfff"},
        {"messages": [{"role": "user", "content": "a\ud800"}]},
        {"messages": [{"role": "user", "content": "a", "\ud800": 1}]},
        {"\ud800": 1},
    ],
)
def test_a_lone_surrogate_is_refused_wherever_it_is(fields: dict[str, Any]) -> None:
    refusal = refused(**fields)
    assert (refusal.status, refusal.code) == (400, "invalid_json") and "at line 1 column" in str(refusal)


def test_jsons_1_0_is_1_and_null_is_absent() -> None:
    assert read(max_tokens=1.0, top_k=3.0, seed=-0.0, temperature=1).generation() == {
        "max_new_tokens": 1,
        "top_k": 3,
        "seed": 0,
        "temperature": 1.0,
    }
    names = [name for name in REQUEST.model_fields if name not in ASKED]
    assert read(**dict.fromkeys(names)).generation() == {}


def with_nulls(cls: type[BaseModel], value: dict[str, Any]) -> dict[str, Any]:
    """A part of a request with null for each field that it leaves out, and for one that does not exist."""
    return dict.fromkeys(field.alias or name for name, field in cls.model_fields.items()) | {"other": None} | value


def test_null_is_absent_at_every_level() -> None:
    picture = with_nulls(ImagePart, {"type": "image_url", "image_url": with_nulls(ImageURL, {"url": "data:"})})
    messages = [
        with_nulls(SystemMessage, {"role": "system", "content": [with_nulls(TextPart, {"type": "text", "text": "s"})]}),
        with_nulls(AssistantMessage, {"role": "assistant"}),
        with_nulls(UserMessage, {"role": "user", "content": [picture]}),
    ]
    schema = with_nulls(JsonSchema, {"schema": {"enum": [None], "default": None}})
    shape = with_nulls(ResponseFormat, {"type": "json_schema", "json_schema": schema})
    asked = read(messages=messages, response_format=shape, stream_options=with_nulls(StreamOptions, {}))
    assert [message.role for message in asked.messages] == ["system", "assistant", "user"]
    # a null inside a schema is the schema's own
    kept = {"schema": {"enum": [None], "default": None}}
    assert asked.generation() == {"response_format": {"type": "json_schema", "json_schema": kept}}


NEUTRAL = {
    "n": 1, "max_tokens": -1, "max_completion_tokens": -1, "top_k": -1, "seed": -1, "logit_bias": {}, "min_p": 0,
    "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0, "stop_token_ids": [],
    "stop": [], "ignore_eos": False, "stream": False, "logprobs": False, "top_logprobs": 0,
    "stream_options": {"include_usage": False}, "response_format": {"type": "text"}, "structured_outputs": {},
    "tools": [], "tool_choice": "none", "functions": [], "function_call": "auto", "parallel_tool_calls": True,
    "modalities": ["text"], "best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "echo": False,
    "early_stopping": False, "skip_special_tokens": True, "include_stop_str_in_output": False, "bad_words": [],
    "mm_processor_kwargs": {}, "add_generation_prompt": True, "continue_final_message": False,
}  # fmt: skip


def test_neutral_values_change_nothing_alone_and_together() -> None:
    assert read(max_tokens=-1).generation() == {"max_new_tokens": 2**31 - 1}  # as much as the context holds
    for fields in (*({name: value} for name, value in NEUTRAL.items()), NEUTRAL):
        options = read(**{name: value for name, value in fields.items() if "max_" not in name}).generation()
        own = GenerationOptions(do_sample=False)
        assert own.with_overrides(options) == own, fields
        read(**fields)


@pytest.mark.parametrize("name", REQUEST.ignored)
@pytest.mark.parametrize("value", ["high", 0, {"a": [1]}, True])
def test_settings_of_other_servers_are_without_effect(name: str, value: Any) -> None:
    assert read(**{name: value}).generation() == {}


@pytest.mark.parametrize("name", REQUEST.neutral)
def test_an_option_that_is_not_here_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    refusal = refused(**{name: "something else"})
    assert (refusal.param, refusal.code) == (name, "unsupported_parameter")


def test_all_that_is_wrong_is_listed_at_once() -> None:
    refusal = refused(tools=[{}], functions=[{}], temprature=1, foo=2, top_p=7, n=0, messages=[])
    assert (refusal.param, refusal.code, refusal.status) == ("temprature", "unknown_parameter", 400)
    assert str(refusal).startswith("temprature, foo: this field is not known; ")
    for part in (
        "tools, functions: this is not",
        "top_p: Input should be less",
        "n: Input should be",
        "messages: List",
    ):
        assert part in str(refusal)
    assert set(refusal.params) == {"messages", "top_p", "n", "tools", "functions"}  # for the log: no unknown one
    many = str(refused(**{f"k{index}": 1 for index in range(1000)}))
    assert many == "k0, k1, k2, k3, k4, k5, k6, k7, 992 more: this field is not known"


def test_unknown_keys_of_messages_parts_and_stream_options_are_ignored_and_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tolerant, "_logged", set())
    caplog.set_level("INFO", "qvl_edge.server")
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}
    image = {"type": "image_url", "image_url": {"url": "data:", "format": "png"}, "cache_control": 1}
    message = {"role": "user", "content": [part, image], "annotations": [], "a secret of the caller": 1}
    for _ in range(3):
        read(messages=[message], stream=True, stream_options={"include_usage": True, "chunk_size": 4})
    names = ("cache_control", "format", "annotations", "chunk_size")
    assert sorted(caplog.messages) == sorted(f"ignored the unknown key {name}" for name in names)
    began = time.perf_counter()
    read(messages=[message | {f"k{chr(97 + i % 26) * (i // 26)}": 1 for i in range(20_000)}])
    assert time.perf_counter() - began < 2 and len(caplog.messages) <= MAX_LOGGED


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"guided_json": {"type": "object"}}, {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}),
        ({"guided_json": '{"type": "object"}'}, {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}),
        ({"guided_regex": "a+"}, {"type": "regex", "regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"type": "choice", "choice": ["a", "b"]}),
        ({"structured_outputs": {"choice": ["a"]}}, {"type": "choice", "choice": ["a"]}),
        ({"structured_outputs": {"regex": "a"}}, {"type": "regex", "regex": "a"}),
        ({"structured_outputs": {"json": {}}}, {"type": "json_schema", "json_schema": {"schema": {}}}),
        ({"structured_outputs": {"json_object": True}}, {"type": "json_object"}),
        ({"response_format": {"type": "json_object", "schema": {"a": 1}}}, {"type": "json_object", "schema": {"a": 1}}),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, {"type": "regex", "regex": "a"}),
    ],
)
def test_every_way_to_ask_for_a_structure_reaches_the_engine(fields: dict[str, Any], shape: dict[str, Any]) -> None:
    assert read(**fields).generation() == {"response_format": shape}


def test_fields_that_do_not_go_together_are_all_named_at_once() -> None:
    conflicts = {
        "max_tokens": {"max_tokens": 1, "max_completion_tokens": 2},
        "stream_options": {"stream_options": {"include_usage": True}},
        "top_logprobs": {"top_logprobs": 2},
        "continue_final_message": {"continue_final_message": True},
        "structured_outputs.choice": {"guided_regex": "a", "structured_outputs": {"choice": ["b"]}},
    }
    with pytest.raises(Refusal) as refused:
        read(**{name: value for fields in conflicts.values() for name, value in fields.items()})
    assert sorted(refused.value.params) == sorted(conflicts)
    assert all(f"{name}: " in str(refused.value) for name in conflicts)
    with pytest.raises(Refusal, match="^structured_outputs.choice: guided_regex says already[^;]*; send one of them$"):
        read(**conflicts["structured_outputs.choice"])


@pytest.mark.parametrize("role", ["system", "user", "developer"])
def test_markup_of_an_image_in_text_is_told_how_to_send_one(role: str) -> None:
    for words in (
        "<img>demo-output/scene-1.png</img>\nWhat is it?",
        "Picture 1: <img>http://a.example/b</img>",
        "<img>\n a<b>.png\n</img>",
        f"<img>{'iVBORw0KGgo' * 4}</img>",
    ):
        found = Conversation.of(read(messages=[{"role": role, "content": words}]).messages).refusals
        assert found[0].code == "image_in_text"
        assert re.match(r"messages\[0\].content: <img>…</img> in text opens nothing here.*image_url", str(found[0]))
    plain = ("<img>", "<img></img>", "how do I close <img> and </img>?", "<img src='a.png'>", "</img>a/b<img>")
    for words in (*plain, "<img>" * 50_000):
        assert not Conversation.of(read(messages=[{"role": role, "content": words}]).messages).refusals
    said = {"role": "assistant", "content": "<img>a/b.png</img>"}  # a model may have written it
    assert Conversation.of(read(messages=[said, *ASKED["messages"]]).messages).messages[0].content == said["content"]


@pytest.mark.parametrize(
    ("fields", "continued"),
    [({}, True), ({"continue_final_message": True, "add_generation_prompt": False}, True),
     ({"add_generation_prompt": True}, False), ({"continue_final_message": False}, False)],
)  # fmt: skip
def test_an_assistants_last_message_is_continued_unless_a_new_one_is_asked_for(
    fields: dict[str, Any], continued: bool
) -> None:
    messages = [*ASKED["messages"], {"role": "assistant", "content": "Sure,"}]
    assert read(messages=messages, **fields).continued is continued
    assert not read(add_generation_prompt=True, continue_final_message=False).continued
