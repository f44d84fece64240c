"""Every option of loading and of generating: its type, default, range and help, stated once.

The Python API, the commands, the server's schema and the table in docs/options.md are all filled from the two classes
at the end of this file, and every value is checked by them: ConfigError names the option, the value and what is taken.
"""

import argparse
import difflib
import json
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from qvl_edge.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
"""Compute dtype, and that of the layers that are not int4."""
Head = Literal["auto", "float16", "int8"]
"""lm_head: in the compute dtype (auto, float16), or weight-only int8."""
KVType = Literal["auto", "float16", "int8"]
"""Keys and values: in the compute dtype (auto, float16), or int8 with one scale per token and head."""
Embeddings = Literal["host", "device"]
"""The embedding table: read from the mapped file (8 KiB per token of Qwen-7B), or on the device."""
Vision = Literal["resident", "released", "elsewhere"]
"""The vision tower: always in memory, only while images are encoded, or on another device."""
Source = Literal["hf", "modelscope"]
"""The hub that a model's name is looked up on."""


@dataclass(frozen=True)
class Profile:
    """Precision of everything outside the decoder's layers. vit: dtype of the exported vision tower."""

    vit: str
    head: Head
    kv_cache: KVType


# the most exact first
PROFILES = {
    "12g": Profile("float16", "float16", "float16"),
    "8g": Profile("int8", "int8", "int8"),
    "6g": Profile("int4", "int8", "int8"),
}

INT64 = (-(1 << 63), (1 << 63) - 1)
INT32_MAX = (1 << 31) - 1
MAX_LOGPROBS = 20  # as OpenAI's top_logprobs
MAX_BIAS = 100  # of logit_bias, either way, as OpenAI
MIN_TEMPERATURE = 1e-3  # below it logits / temperature overflows float32, and sampling is greedy anyway
# given without do_sample, each of these turns sampling on, unless it has the value that asks for nothing
SAMPLING = {"temperature": None, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None}


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its type and default.

    Range: least <= value <= most, or least < value where `above`. flag: its name on a command line, if it is not
    --name-with-dashes; None: it has no flag.
    """

    help: str
    least: float | None = None
    most: float | None = None
    above: bool = False
    flag: str | None = ""
    metavar: str | None = None
    items: type = str  # of a tuple

    @property
    def range(self) -> str:
        """The range in words; empty where there is none."""
        if self.least is None:
            return ""
        if self.least == INT64[0]:
            return "64 bits, signed"
        if self.most is None or self.most == INT32_MAX:
            return f"more than {self.least:g}" if self.above else f"{self.least:g} or more"
        if self.above:
            return f"more than {self.least:g}, at most {self.most:g}"
        return f"{self.least:g} to {self.most:g}"

    def holds(self, value: float) -> bool:
        """Whether `value` is in the range."""
        if self.least is not None and (value < self.least or (self.above and value == self.least)):
            return False
        return self.most is None or value <= self.most


def option(default: Any, help: str, **details: Any) -> Any:
    """A dataclass field with its Option."""
    return field(default=default, metadata={"option": Option(help, **details)})


class Options:
    """Base of the two classes below: frozen dataclasses whose fields are made by `option`."""

    noun: ClassVar[str]  # in messages

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            object.__setattr__(self, item.name, _checked(type(self), item, getattr(self, item.name)))

    @classmethod
    def known(cls, names: Iterable[str]) -> None:
        """ConfigError if one of `names` is no option, with the nearest that is."""
        there = [item.name for item in fields(cls)]  # type: ignore[arg-type]
        for name in names:
            if name not in there:
                near = difflib.get_close_matches(name, there, 1)
                meant = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(f"unknown {cls.noun} {name!r}; {meant}known are {', '.join(sorted(there))}")

    @classmethod
    def add_arguments(cls, parser: Any, *, leave_out: Iterable[str] = ()) -> None:
        """A flag for each option on `parser` (or a group of one), None where it is not given."""
        for item in fields(cls):  # type: ignore[arg-type]
            details: Option = item.metadata["option"]
            if item.name in leave_out or details.flag is None:
                continue
            kind, _ = kind_of(cls, item.name)
            arguments: dict[str, Any] = {"dest": item.name, "default": None, "help": _help(item, details)}
            if kind is bool:
                arguments["action"] = "store_false" if item.default is True else "store_true"
            elif kind is tuple:
                convert = _number_or_text if details.items is int else str
                arguments |= {"action": "append", "type": convert, "metavar": details.metavar}
            elif get_origin(kind) is Literal:
                arguments["choices"] = get_args(kind)
            else:
                arguments |= {"type": _number_or_text if kind in (int, float) else str, "metavar": details.metavar}
            parser.add_argument(details.flag or f"--{item.name.replace('_', '-')}", **arguments)

    @classmethod
    def given(cls, args: argparse.Namespace) -> dict[str, Any]:
        """The options that a command line gave. ConfigError for a value that is not taken."""
        names = [item.name for item in fields(cls)]  # type: ignore[arg-type]
        values = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
        for item in fields(cls):  # type: ignore[arg-type]
            if item.name in values:
                values[item.name] = _checked(cls, item, values[item.name])
        return values


def kind_of(cls: Any, name: str) -> tuple[Any, bool]:
    """(type of an option, whether None is taken): int, float, bool, str, tuple, Mapping or a Literal."""
    hint = get_type_hints(cls)[name]
    optional = get_origin(hint) in (Union, UnionType)  # with None, and nothing else here
    if optional:
        hint = next(arg for arg in get_args(hint) if arg is not NoneType)
    return (tuple if get_origin(hint) is tuple else Mapping if get_origin(hint) is Mapping else hint), optional


def _checked(cls: Any, item: "Field[Any]", value: Any) -> Any:
    """`value` in the option's type. ConfigError with the value and what is taken."""
    (kind, optional), details = kind_of(cls, item.name), item.metadata["option"]
    if value is None and optional:
        return None
    found, expected = _items(details, value) if kind is tuple else _converted(kind, value)
    if found is None or (isinstance(found, int | float) and not details.holds(found)):
        if details.range:
            expected = f"{expected}, {details.range}"
        raise ConfigError(f"{item.name} is {value!r:.80}, expected {expected}{' or None' * optional}")
    return found


def _converted(kind: Any, value: Any) -> tuple[Any, str]:
    """(`value` as `kind`, or None if it is not one; what was expected)."""
    if kind is bool:
        return (bool(value) if isinstance(value, bool) or type(value).__name__ == "bool_" else None), "True or False"
    if get_origin(kind) is Literal:
        return (value if value in get_args(kind) else None), "one of " + ", ".join(map(repr, get_args(kind)))
    if kind is Mapping:
        return _mapping(value), "a mapping, or its JSON"
    if kind not in (int, float):
        return (str(value) if isinstance(value, kind) or hasattr(value, "__fspath__") else None), "a string"
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if kind is float:
        return (float(value) if number else None), "a number"
    return (int(value) if number and int(value) == value else None), "an integer"  # JSON writes 1 as 1.0 too


def _items(details: Option, value: Any) -> tuple[Any, str]:
    """A tuple of strings or of integers, as `_converted`."""
    values = value if isinstance(value, list | tuple) else (value,)
    if details.items is str:
        valid = all(isinstance(text, str) and text for text in values)
        return (tuple(values) if valid else None), "a string or strings, none of them empty"
    numbers = tuple(_converted(int, number)[0] for number in values)
    valid = all(number is not None and details.holds(number) for number in numbers)
    return (numbers if valid else None), "an integer or integers"


def _mapping(value: Any) -> Any:
    if isinstance(value, str):  # from a command line
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, Mapping) else None


def _number_or_text(text: str) -> Any:
    """A number from a command line; other text is left to `_checked`, whose message names the option."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _help(item: "Field[Any]", details: Option) -> str:
    shown = item.default not in (None, (), True, False)
    return details.help + (f" (default: {item.default})" if shown else "")


@dataclass(frozen=True)
class LoadOptions(Options):
    """How a model is loaded."""

    noun: ClassVar[str] = "loading option"

    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto is CUDA where torch sees it", metavar="DEVICE")
    dtype: Dtype | None = option(None, "compute dtype (default: float32 on a CPU, float16 on CUDA)")
    profile: Literal["auto", "12g", "8g", "6g"] = option(
        "auto",
        "12g: nothing beyond int4 is lost; 8g: vision tower, lm_head and KV cache in int8; 6g: the tower in int4; "
        "auto: the first that fits into free memory",
    )
    max_context: int | None = option(
        None, "positions for prompt and answer (default: as many as fit, up to the model's)",
        least=1, most=INT32_MAX, metavar="N",
    )  # fmt: skip
    slots: int = option(1, "sequences that are decoded at once", least=1, most=16, flag=None)
    max_memory: str | None = option(
        None, "memory to use, such as 8GB or 8GiB, instead of all that is free", metavar="SIZE"
    )
    kv_cache: KVType | None = option(
        None, "keys and values: auto or float16 (the compute dtype), or int8 (default: the profile's)"
    )
    head: Head | None = option(None, "lm_head: auto or float16 (the compute dtype), or int8 (default: the profile's)")
    embeddings: Embeddings = option("host", "embedding table: read from the mapped file, or on the device")
    vision_device: str | None = option(
        None, "where images are encoded: cpu, cuda or cuda:N (default: --device)", metavar="DEVICE"
    )
    release_vision: bool = option(False, "keep the vision tower in memory only while it encodes")
    lookup: int = option(
        0, "prompt-lookup draft length of a lone greedy request; the answer stays the same (0: off, 7 is usual)",
        least=0, most=511, metavar="N",
    )  # fmt: skip
    chat_format: Literal["chatml", "raw"] | None = option(
        None, "chatml, or raw: text is continued, as by the base model (default: as the model's generation_config.json)"
    )
    lora: str | None = option(
        None, "merge this PEFT adapter into the float checkpoint that it is loaded with", metavar="DIR"
    )
    background: str = option(
        "white", "colour behind transparent pixels; none: whatever is there, as upstream", metavar="COLOUR"
    )
    verify: bool = option(False, "check the hash of every file of the bundle first")
    source: Source = option("hf", "hub of a model that is given by name")
    revision: str | None = option(None, "branch, tag or commit on the hub", metavar="REV")
    local_files_only: bool = option(False, "download nothing", flag=None)
    cache_dir: str | None = option(None, "where exported vision towers are cached", flag=None)

    def __post_init__(self) -> None:
        if isinstance(self.max_memory, int) and not isinstance(self.max_memory, bool):
            object.__setattr__(self, "max_memory", f"{self.max_memory}B")
        super().__post_init__()
        for name in ("kv_cache", "head"):  # vLLM's word for the same
            if getattr(self, name) == "auto":
                object.__setattr__(self, name, "float16")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """From keyword arguments. ConfigError for one that is not known."""
        cls.known(options)
        return cls(**options)


@dataclass(frozen=True)
class GenerationOptions(Options):
    """How an answer is generated, under transformers' names; defaults come from the model's generation_config.json.

    do_sample decides between sampling and greedy decoding. Where it is not given, temperature=0 is greedy, and
    temperature, top_p below 1, top_k, min_p or seed alone turn sampling on.
    """

    noun: ClassVar[str] = "generation option"

    max_new_tokens: int = option(512, "most tokens of an answer", least=1, most=INT32_MAX, metavar="N")
    min_new_tokens: int = option(0, "tokens before the model's own end may come", least=0, most=INT32_MAX, metavar="N")
    do_sample: bool = option(True, "sample, or always take the likeliest token (--greedy)", flag="--greedy")
    temperature: float = option(1.0, "divides the logits; 0 is greedy", least=0, metavar="T")
    top_p: float = option(
        1.0, "sample from the smallest set of tokens whose probabilities reach P", least=0, most=1, above=True,
        metavar="P",
    )  # fmt: skip
    top_k: int = option(0, "sample from the K likeliest tokens (0: all)", least=0, most=INT32_MAX, metavar="K")
    min_p: float = option(
        0.0, "sample from tokens at least P times as probable as the likeliest", least=0, most=1, metavar="P"
    )
    repetition_penalty: float = option(
        1.0, "above 1, tokens of prompt and answer become less likely: their logits are divided by R, or multiplied "
        "where negative", least=0, most=10, above=True, metavar="R",
    )  # fmt: skip
    presence_penalty: float = option(
        0.0, "subtracted from the logits of tokens that the answer has", least=-2, most=2, metavar="R"
    )
    frequency_penalty: float = option(
        0.0, "subtracted from the logits of tokens for each time that the answer has them", least=-2, most=2,
        metavar="R",
    )  # fmt: skip
    logit_bias: Mapping[int, float] | None = option(
        None, f"added to the logits: {{token id: -{MAX_BIAS} to {MAX_BIAS}}}", metavar="JSON"
    )
    seed: int | None = option(
        None, "makes sampling repeatable (default: different at every call)", least=INT64[0], most=INT64[1], metavar="S"
    )
    stop: tuple[str, ...] = option((), "end the answer before this text; repeatable", metavar="TEXT")
    stop_token_ids: tuple[int, ...] = option(
        (), "end the answer at this token, besides the model's own; repeatable", least=0, most=INT32_MAX, items=int,
        metavar="ID",
    )  # fmt: skip
    logprobs: int | None = option(
        None, "log-probability of each token, and of this many likeliest ones", least=0, most=MAX_LOGPROBS, flag=None
    )
    response_format: Mapping[str, Any] | None = option(
        None, "constrained output, as OpenAI's response_format (engine/constraint.py)", metavar="JSON"
    )
    ignore_eos: bool = option(False, "continue past the model's own end, to max_new_tokens: for benchmarks")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens is {self.min_new_tokens}, expected at most max_new_tokens, {self.max_new_tokens}"
            )
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "do_sample", False)

    @classmethod
    def from_config(cls, generation_config: Mapping[str, Any]) -> "GenerationOptions":
        """From a parsed generation_config.json; keys that are no options of ours are ignored."""
        known = {item.name for item in fields(cls)}
        return cls(**{k: v for k, v in generation_config.items() if k in known and v is not None})

    def check_vocab(self, vocab: int) -> None:
        """ConfigError if a token id is not below `vocab`."""
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            if ids and max(ids) >= vocab:
                raise ConfigError(f"{name} has token id {max(ids)}, expected ids below {vocab}, the vocabulary's size")

    def with_overrides(self, overrides: Mapping[str, Any]) -> "GenerationOptions":
        """A copy with `overrides`, of which None is none. ConfigError for a name that is not known."""
        self.known(overrides)
        given = {name: value for name, value in overrides.items() if value is not None}
        asked = any(name in given and given[name] != nothing for name, nothing in SAMPLING.items())
        if "do_sample" not in given and asked:
            given["do_sample"] = True  # unless temperature is 0: see __post_init__
        if given.get("do_sample") and "temperature" not in given and self.temperature < MIN_TEMPERATURE:
            given["temperature"] = 1.0
        return replace(self, **given)


def _biases(given: Mapping[Any, Any]) -> dict[int, float]:
    """logit_bias with numbers as keys, which JSON writes as strings."""
    found = {}
    for key, value in given.items():
        name = str(key)
        bias = _converted(float, value)[0]
        if not (name.isascii() and name.isdigit()) or len(name) > 10 or bias is None or abs(bias) > MAX_BIAS:
            raise ConfigError(
                f"logit_bias is {{{key!r:.40}: {value!r:.40}}}, expected token ids with numbers from -{MAX_BIAS} to "
                f"{MAX_BIAS}"
            )
        found[int(name)] = bias
    return found


def table(cls: type[Options]) -> str:
    """The options as rows of a Markdown table: name, flag, type, default, range, help."""
    rows = ["| option | flag | type | default | range | meaning |", "| --- | --- | --- | --- | --- | --- |"]
    for item in fields(cls):  # type: ignore[arg-type]
        details: Option = item.metadata["option"]
        kind, _ = kind_of(cls, item.name)
        if get_origin(kind) is Literal:
            shown = " or ".join(f"`{value}`" for value in get_args(kind))
        else:
            sequence = "integers" if details.items is int else "strings"
            shown = {tuple: sequence, Mapping: "mapping"}.get(kind, getattr(kind, "__name__", str(kind)))
        flag = "" if details.flag is None else f"`{details.flag or '--' + item.name.replace('_', '-')}`"
        default = "" if item.default in (None, ()) else f"`{item.default}`"
        rows.append(f"| `{item.name}` | {flag} | {shown} | {default} | {details.range} | {details.help} |")
    return "\n".join(rows) + "\n"
