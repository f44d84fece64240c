"""What a request may say: how a wrong value is reported, what counts as equal, and that hostile ones stay cheap."""

import json
import time
from typing import Any

import pytest

from qvl_edge.options import GenerationOptions
from qvl_edge.server.guard import parse_json
from qvl_edge.server.protocol import ChatCompletionRequest, Limits, request_model
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
        (
            {"messages": user({"type": "text", "text": "a", "x": 1})},
            "messages[0].content[0].x: this field is not known",
        ),
        ({"stream_options": {"usage": True}}, "stream_options.usage: this field is not known"),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type: Input should be 'text', 'boxes', 'json_object' or",
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
    refusal = refused(messages=user({"type": "image_url", "image_url": uri}))
    assert refusal.param == "messages[0].content[0].image_url" and "secret" not in str(refusal)


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


def test_generation_options_have_the_names_that_the_runtime_knows() -> None:
    every = {"temperature": 0, "top_p": 0.5, "top_k": 2, "repetition_penalty": 1.1, "seed": 3, "stop": "x"}
    more = {"max_completion_tokens": 7, "logprobs": True, "top_logprobs": 2, "response_format": {"type": "boxes"}}
    options = GenerationOptions().with_overrides(read(**every, **more).generation())
    assert (options.do_sample, options.max_new_tokens, options.stop, options.logprobs) == (False, 7, ("x",), 2)
    assert options.response_format == {"type": "boxes"} and options.seed == 3
    assert GenerationOptions(do_sample=False).with_overrides(read(seed=3).generation()).do_sample


@pytest.mark.parametrize(
    "fields",
    [
        {f"k{index}": 1 for index in range(40_000)},
        {"messages": user(*[3] * 40_000)},
        {"messages": user(*[{"type": "text", "text": 3, "x": 1}] * 9_000)},
        {"messages": [{"role": "user", "content": "a", **{f"k{index}": 1 for index in range(40_000)}}]},
        {"messages": [3] * 40_000},
        {"stop": [""] * 40_000},
        {"tools": [3] * 40_000},
        {"modalities": ["x"] * 40_000},
        {"stream_options": {f"k{index}": 1 for index in range(40_000)}},
        {"messages": [{"role": "x" * 9_000_000, "content": "a"}]},
        {"model": "x" * 9_000_000},
        {"x" * 9_000_000: 1},
    ],
    ids=lambda fields: next(iter(fields))[:20],
)
def test_a_request_with_many_mistakes_is_refused_quickly(fields: dict[str, Any]) -> None:
    body = parse_json(json.dumps({**ASKED, **fields}).encode())
    began = time.perf_counter()
    with pytest.raises(Refusal) as error:
        REQUEST.parse(body)
    assert time.perf_counter() - began < 2  # 0.2 s here; hours if it were more than linear
    assert len(str(error.value)) < 300
