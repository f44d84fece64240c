"""What an option is: its type, default, range and help, and how a value is checked, for a class of them."""

import argparse
import difflib
import json
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from qvl_edge import markdown
from qvl_edge.errors import ConfigError

INT64 = (-(1 << 63), (1 << 63) - 1)
INT32_MAX = (1 << 31) - 1


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
    """Base of LoadOptions and GenerationOptions: frozen dataclasses whose fields are made by `option`."""

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
    found, expected = _items(details, value) if kind is tuple else converted(kind, value)
    if found is None or (isinstance(found, int | float) and not details.holds(found)):
        if details.range:
            expected = f"{expected}, {details.range}"
        raise ConfigError(f"{item.name} is {value!r:.80}, expected {expected}{' or None' * optional}")
    return found


def converted(kind: Any, value: Any) -> tuple[Any, str]:
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
    numbers = tuple(converted(int, number)[0] for number in values)
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


def table(cls: type[Options]) -> str:
    """The options as rows of a Markdown table: name, flag, type, default, range, help."""
    rows = []
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
        rows.append([f"`{item.name}`", flag, shown, default, details.range, details.help])
    return markdown.table(["option", "flag", "type", "default", "range", "meaning"], rows) + "\n"
