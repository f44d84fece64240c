"""Options: one set of types, ranges and rules at every door."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl_edge.errors import ConfigError
from qvl_edge.option import kind_of, table
from qvl_edge.options import PROFILES, GenerationOptions, LoadOptions

MODELS_OWN = GenerationOptions(do_sample=False)  # as a generation_config.json that asks for greedy decoding


@pytest.mark.parametrize(
    ("overrides", "sampled"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 1e-9}, False),  # logits / temperature would overflow
        ({"temperature": 0.7}, True),
        ({"top_p": 0.5}, True),
        ({"top_k": 3}, True),
        ({"seed": 1}, True),
        ({"repetition_penalty": 1.1}, False),
        ({"min_p": 0.1}, True),
        ({"min_p": 0}, False),
        ({"top_p": 1, "top_k": 0}, False),
        ({"top_p": 1, "temperature": 1}, True),
        ({"presence_penalty": 1, "frequency_penalty": 1, "logit_bias": {}, "stop_token_ids": [1]}, False),
        ({"temperature": 0, "top_p": 0.5, "seed": 1}, False),
        ({"do_sample": False, "temperature": 0.7, "seed": 1}, False),
        ({"do_sample": True, "top_p": 0.5}, True),
        ({"temperature": None, "seed": None}, False),
    ],
)
def test_what_is_given_decides_between_sampling_and_greedy(overrides: dict[str, Any], sampled: bool) -> None:
    assert MODELS_OWN.with_overrides(overrides).do_sample is sampled


def test_a_models_own_temperature_of_0_is_greedy_until_sampling_is_asked_for() -> None:
    own = GenerationOptions.from_config({"temperature": 0, "do_sample": True})
    assert own.do_sample is False
    asked = own.with_overrides({"top_p": 0.5})
    assert (asked.do_sample, asked.temperature, asked.top_p) == (True, 1.0, 0.5)
    assert own.with_overrides({"do_sample": True}).temperature == 1.0


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": "0.5"},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": True},
        {"top_k": -1},
        {"top_k": [1]},
        {"max_new_tokens": 0},
        {"max_new_tokens": 3.5},
        {"max_new_tokens": True},
        {"max_new_tokens": 1 << 31},
        {"seed": 1 << 64},
        {"seed": "x"},
        {"stop": [""]},
        {"stop": 3},
        {"do_sample": 1},
        {"logprobs": 21},
        {"min_p": 1.1},
        {"presence_penalty": -2.1},
        {"frequency_penalty": "1"},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {1: 101}},
        {"logit_bias": {1: None}},
        {"logit_bias": [1]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": ["5"]},
        {"stop_token_ids": [1.5]},
        {"response_format": "json"},
        {"min_new_tokens": 5, "max_new_tokens": 4},
    ],
)
def test_a_bad_value_is_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(bad))} is .*expected"):
        GenerationOptions().with_overrides(bad)


def test_numbers_of_numpy_and_of_json_are_numbers() -> None:
    options = GenerationOptions(max_new_tokens=4.0, top_k=np.int64(3), temperature=np.float32(0.5), seed=2.0)  # type: ignore[arg-type]
    assert (options.max_new_tokens, options.top_k, options.temperature, options.seed) == (4, 3, 0.5, 2)
    assert type(options.max_new_tokens) is int and type(options.temperature) is float
    assert GenerationOptions(stop="end").stop == ("end",)  # type: ignore[arg-type]


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.text(max_size=2), max_size=2)
)


@pytest.mark.parametrize("cls", [LoadOptions, GenerationOptions])
@given(data=st.data())
def test_any_value_is_taken_in_its_type_or_refused(cls: type, data: st.DataObject) -> None:
    item = data.draw(st.sampled_from(fields(cls)))
    try:
        options = cls(**{item.name: data.draw(anything)})
    except ConfigError as error:
        assert item.name in str(error)
        return
    kind, optional = kind_of(cls, item.name)
    value = getattr(options, item.name)
    allowed = get_args(kind) or None
    assert (value is None and optional) or (value in allowed if allowed else isinstance(value, kind))


def test_a_misspelt_option_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown generation option 'temprature'; did you mean 'temperature'"):
        GenerationOptions().with_overrides({"temprature": 1.0})
    with pytest.raises(ConfigError, match="unknown loading option 'kv_cach'; did you mean 'kv_cache'"):
        LoadOptions.of({"kv_cach": "int8"})


def test_published_generation_configs_are_read_and_other_keys_ignored() -> None:
    options = GenerationOptions.from_config(
        {"chat_format": "chatml", "top_k": 0, "top_p": 0.3, "max_new_tokens": 512, "do_sample": True, "eos_token_id": 1}
    )
    assert (options.top_p, options.max_new_tokens, options.do_sample) == (0.3, 512, True)


def test_load_options_take_what_the_python_api_takes() -> None:
    options = LoadOptions.of({"max_memory": 8 << 30, "cache_dir": Path("x"), "kv_cache": "auto", "head": "int8"})
    assert (options.max_memory, options.cache_dir) == (f"{8 << 30}B", "x")
    assert (options.kv_cache, options.head) == ("float16", "int8")  # auto: the model's dtype, as float16 means here
    assert set(get_args(kind_of(LoadOptions, "profile")[0])) == {"auto", *PROFILES}


def parsed(cls: type[LoadOptions] | type[GenerationOptions], *arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    cls.add_arguments(parser)
    return cls.given(parser.parse_args(arguments))


def test_command_lines_say_only_what_was_given() -> None:
    assert parsed(LoadOptions) == parsed(GenerationOptions) == {}
    assert parsed(LoadOptions, "--max-context", "64", "--release-vision", "--kv-cache", "int8") == {
        "max_context": 64,
        "release_vision": True,
        "kv_cache": "int8",
    }
    assert parsed(GenerationOptions, "--greedy", "--stop", "a", "--stop", "b", "--top-p", "0.5") == {
        "do_sample": False,
        "stop": ("a", "b"),
        "top_p": 0.5,
    }
    arguments = ["--logit-bias", '{"5": -100}', "--stop-token-ids", "7", "--stop-token-ids", "8", "--ignore-eos"]
    arguments += ["--response-format", '{"type": "json_object"}', "--min-new-tokens", "2", "--min-p", "0.1"]
    options = GenerationOptions().with_overrides(parsed(GenerationOptions, *arguments))
    assert (options.logit_bias, options.stop_token_ids, options.min_p) == ({5: -100.0}, (7, 8), 0.1)
    assert (options.response_format, options.ignore_eos, options.min_new_tokens) == ({"type": "json_object"}, True, 2)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-new-tokens", "3.5"),
        ("--temperature", "hot"),
        ("--seed", str(1 << 64)),
        ("--top-k", "-1"),
        ("--logit-bias", "5"),
        ("--stop-token-ids", "x"),
    ],
)
def test_a_bad_flag_is_refused_in_the_same_words(flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag[2:].replace('-', '_')} is .*expected"):
        parsed(GenerationOptions, flag, value)


@pytest.mark.parametrize("cls", [LoadOptions, GenerationOptions])
def test_the_table_has_a_row_for_every_option(cls: type[LoadOptions] | type[GenerationOptions]) -> None:
    rows = table(cls).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [item.name for item in fields(cls)]


def test_the_documentation_has_the_table() -> None:
    page = (Path(__file__).parent.parent / "docs/options.md").read_text(encoding="utf-8")
    assert table(LoadOptions) in page and table(GenerationOptions) in page
