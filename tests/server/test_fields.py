"""The tables of fields in docs/server.md, in both languages, line by line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qvl_edge.server.completions import completion_model
from qvl_edge.server.fields import Request
from qvl_edge.server.protocol import Limits, request_model
from qvl_edge.server.refusal import Refusal
from qvl_edge.server.responses import response_model

DOCS = Path(__file__).parents[2] / "docs"
MODELS: dict[str, type[Request]] = {
    "chat": request_model("small", Limits()),
    "completions": completion_model("small", Limits()),
    "responses": response_model("small", Limits()),
}
ASKED: dict[str, dict[str, Any]] = {
    "chat": {"model": "small", "messages": [{"role": "user", "content": "a"}]},
    "completions": {"model": "small", "prompt": "a"},
    "responses": {"model": "small", "input": "a"},
}
# of each honoured field a value, and what it is to the engine; None: it is not one of its options
HONOURED: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "model": ("small", None), "messages": ([{"role": "user", "content": "b"}], None), "prompt": ([1, 2], None),
    "continue_final_message": (False, None), "add_generation_prompt": (True, None), "input": ("b", None),
    "instructions": ("b", None), "logprobs": (True, {"logprobs": 0}), "n": (2, None), "stream": (True, None),
    "stream_options": ({"include_usage": False}, None), "cache_salt": ("a", None),
    "max_tokens": (3, {"max_new_tokens": 3}), "max_completion_tokens": (3, {"max_new_tokens": 3}),
    "max_output_tokens": (3, {"max_new_tokens": 3}), "min_tokens": (2, {"min_new_tokens": 2}),
    "temperature": (0.5, {"temperature": 0.5}), "top_p": (0.5, {"top_p": 0.5}), "top_k": (-1, {"top_k": 0}),
    "min_p": (0.5, {"min_p": 0.5}), "repetition_penalty": (1.5, {"repetition_penalty": 1.5}),
    "presence_penalty": (-1, {"presence_penalty": -1}), "frequency_penalty": (1, {"frequency_penalty": 1}),
    "logit_bias": ({"5": 1}, {"logit_bias": {"5": 1}}), "seed": (5, {"seed": 5}), "stop": ("x", {"stop": ["x"]}),
    "stop_token_ids": ([5], {"stop_token_ids": [5]}), "ignore_eos": (True, {"ignore_eos": True}),
    "response_format": ({"type": "boxes"}, {"response_format": {"type": "boxes"}}), "top_logprobs": (0, None),
    "structured_outputs": ({"regex": "a"}, {"response_format": {"type": "regex", "regex": "a"}}),
    "guided_json": ({"a": 1}, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}}),
    "guided_regex": ("a", {"response_format": {"type": "regex", "regex": "a"}}),
    "guided_choice": (["a"], {"response_format": {"type": "choice", "choice": ["a"]}}),
    "text": ({"format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
}  # fmt: skip


def tables(page: str) -> list[set[tuple[str, str, str]]]:
    """(endpoint, field, last column) of the tables: honoured, neutral, without effect."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", text[text.index("/v1/responses") :], re.M)[:3]:
        rows = set()
        for line in table.splitlines()[2:]:
            names, places, *rest = (cell.strip() for cell in line.strip("|").split(" | "))
            endpoints = MODELS if places in ("all", "全部") else re.split(r", |、", places)
            rows |= {
                (each, name, rest[-1] if rest else "") for each in endpoints for name in re.findall(r"`(\w+)`", names)
            }
        found.append(rows)
    return found


HONOURS, NEUTRAL, WITHOUT_EFFECT = tables("server.md")


def read(endpoint: str, **fields: Any) -> Request:
    return MODELS[endpoint].parse(ASKED[endpoint] | fields)


def test_both_pages_have_every_field_of_every_endpoint_once() -> None:
    for endpoint, model in MODELS.items():
        listed = [name for rows in (HONOURS, NEUTRAL, WITHOUT_EFFECT) for place, name, _ in rows if place == endpoint]
        assert sorted(listed) == sorted(model.model_fields), endpoint
    for english, chinese in zip((HONOURS, NEUTRAL, WITHOUT_EFFECT), tables("zh/server.md"), strict=True):
        assert {row[:2] for row in english} == {row[:2] for row in chinese}
    assert NEUTRAL == tables("zh/server.md")[1]


@pytest.mark.parametrize(("endpoint", "name"), sorted(row[:2] for row in HONOURS))
def test_a_field_that_is_honoured_reaches_the_engine(endpoint: str, name: str) -> None:
    value, expected = (3, {"logprobs": 3}) if (endpoint, name) == ("completions", "logprobs") else HONOURED[name]
    options = read(endpoint, **{name: value}).generation()
    own = read(endpoint).generation()
    assert options == own | (expected or {}) and (expected is None or options != own)


@pytest.mark.parametrize(("endpoint", "name", "accepted"), sorted(NEUTRAL))
def test_a_field_with_a_neutral_value_changes_nothing_and_any_other_is_refused(
    endpoint: str, name: str, accepted: str
) -> None:
    values = [json.loads(value) for value in re.findall(r"`([^`]+)`", accepted)]
    for value in values:
        assert read(endpoint, **{name: value}).generation() == read(endpoint).generation()
    for other in ("another", {"a": 1}, [{}], 17.5):
        with pytest.raises(Refusal) as refusal:
            read(endpoint, **{name: other})
        assert (refusal.value.param, refusal.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(("endpoint", "name"), sorted(row[:2] for row in WITHOUT_EFFECT))
def test_a_field_without_effect_is_taken_with_any_value(endpoint: str, name: str) -> None:
    for value in (True, 3, "high", [1], {"a": None}):
        assert read(endpoint, **{name: value}).generation() == read(endpoint).generation()
