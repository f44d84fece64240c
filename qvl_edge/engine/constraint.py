"""Constrained decoding: boxes, JSON, patterns and choices by llguidance, and no end before min_new_tokens."""

import functools
import importlib
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qvl_edge.engine.compile_check import check_compiles
from qvl_edge.engine.sampling import Constraint
from qvl_edge.engine.schema import closed
from qvl_edge.errors import ConfigError
from qvl_edge.text.tokenizer import BOX, BOX_END, REF, REF_END, Tokenizer

Format = Literal["text", "boxes", "json_object", "json_schema", "regex", "choice"]
FORMATS: tuple[str, ...] = get_args(Format)
# what each has beside its type; `schema` beside json_schema is llama.cpp's way to write it
KEYS = {
    "json_object": ("schema",),
    "json_schema": ("json_schema", "schema"),
    "regex": ("regex",),
    "choice": ("choice",),
}
SCHEMA_KEYS = ("name", "description", "schema", "strict")  # of json_schema
MAX_SCHEMA = 100_000  # characters of a schema, a pattern or all choices
# Free text, and boxes as Qwen-VL was trained to write them: coordinates 0 to 999, and a <ref> has a label and at least
# one box. In llguidance's dialect of Lark <[N]> is the special token of that id, and terminals match ordinary ones.
_NUMBER = "(0|[1-9][0-9]{0,2})"
_BOXES = rf"""
start: (TEXT | labelled | box)*
labelled: <[REF]> TEXT <[REF_END]> box+
box: <[BOX]> CORNERS <[BOX_END]>
TEXT: /(?s:.)+/
CORNERS: /\({_NUMBER},{_NUMBER}\),\({_NUMBER},{_NUMBER}\)/
"""


def constraint_for(
    response_format: Mapping[str, Any] | None,
    tokenizer: Tokenizer,
    vocab: int,
    stop_ids: frozenset[int],
    salt: str = "",
) -> Constraint | None:
    """The constraint of one answer; None where anything may come.

    response_format as OpenAI writes it: {"type": "text"}, {"type": "json_object"}, {"type": "json_schema",
    "json_schema": {"schema": {…}}}; and {"type": "boxes"}, whose boxes are well formed, {"type": "regex", "regex": …},
    {"type": "choice", "choice": ["yes", "no"]}, and a `schema` beside "json_object". ConfigError says what is wrong
    with it. salt: of the cache of what compiles.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind not in FORMATS:
        raise ConfigError(f"response_format has type {kind!r}, known are {', '.join(map(repr, FORMATS))}")
    check_keys(response_format)
    if kind == "text":
        return None
    matcher, encoding = _llguidance().LLMatcher, _encoding(tokenizer, vocab, stop_ids)
    if kind == "boxes":
        grammar = _BOXES
        for name, token in (("REF", REF), ("REF_END", REF_END), ("BOX", BOX), ("BOX_END", BOX_END)):
            grammar = grammar.replace(f"<[{name}]>", f"<[{tokenizer.specials[token]}]>")
    elif kind == "regex":
        grammar = matcher.grammar_from_regex(_short_enough("pattern", _text(response_format)))
    elif kind == "choice":
        # Lark's strings are escaped as JSON's
        words = " | ".join(json.dumps(word, ensure_ascii=False) for word in _choices(response_format))
        grammar = matcher.grammar_from_lark("start: " + _short_enough("choice", words))
    else:
        schema = _schema(response_format)
        _short_enough("JSON schema", json.dumps(schema))
        text = json.dumps(closed(schema))
        # without free whitespace: a small model may emit whitespace forever
        options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            grammar = matcher.grammar_from_json_schema(text, overrides=options)
        except ValueError as error:
            raise ConfigError(f"the JSON schema cannot be used: {error}") from None
    if kind != "boxes":
        check_compiles(grammar, salt)
    return Grammar(matcher(encoding, grammar, log_level=0), vocab)


def check_keys(response_format: Mapping[str, Any]) -> None:
    """ConfigError for a key that its type does not have: what a misspelt one asks for would be dropped silently."""
    kind, schema = response_format["type"], response_format.get("json_schema")
    keys = ("type", *KEYS.get(kind, ()))
    for place, given, known in (
        ("response_format", response_format, keys),
        ("response_format.json_schema", schema if isinstance(schema, Mapping) else {}, SCHEMA_KEYS),
    ):
        unknown = [key for key, value in given.items() if key not in known and value is not None]
        if unknown:
            names = ", ".join(f"{key!r:.40}" for key in unknown[:8])
            raise ConfigError(f"{place} has {names}; with type {kind!r} known are {', '.join(known)}")


def _schema(response_format: Mapping[str, Any]) -> Mapping[str, Any]:
    given = response_format.get("json_schema")
    schema = given.get("schema") if isinstance(given, Mapping) else response_format.get("schema")
    if schema is None and response_format["type"] == "json_object":
        return {"type": "object"}
    if not isinstance(schema, Mapping):
        raise ConfigError('response_format has no schema; expected {"json_schema": {"schema": {…}}}')
    return schema


def _text(response_format: Mapping[str, Any]) -> str:
    pattern = response_format.get("regex")
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError('response_format has no pattern; expected {"type": "regex", "regex": "…"}')
    return pattern


def _choices(response_format: Mapping[str, Any]) -> list[str]:
    words = response_format.get("choice")
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) and word for word in words):
        raise ConfigError('response_format has no choices; expected {"type": "choice", "choice": ["…", "…"]}')
    return list(words)


def _short_enough(what: str, text: str) -> str:
    if len(text) > MAX_SCHEMA:
        raise ConfigError(f"the {what} has {len(text)} characters, at most {MAX_SCHEMA} are taken")
    return text


class MinNewTokens:
    """No end before `count` tokens, except where `inner` leaves nothing else."""

    def __init__(self, count: int, stop_ids: frozenset[int], vocab: int, inner: Constraint | None = None):
        self._left, self._inner = count, inner
        self._go_on = torch.ones(vocab, dtype=torch.bool)
        self._go_on[sorted(stop_ids)] = False

    def allowed(self) -> Tensor:
        """(vocab,) bool."""
        allowed = torch.ones_like(self._go_on) if self._inner is None else self._inner.allowed()
        longer = allowed & self._go_on
        return longer if self._left > 0 and bool(longer.any()) else allowed

    def accept(self, token: int) -> None:
        """Go on after `token`."""
        self._left -= 1
        if self._inner is not None:
            self._inner.accept(token)


class Grammar:
    """A grammar of llguidance, then the end of the answer."""

    def __init__(self, matcher: Any, vocab: int):
        self._matcher, self._vocab = matcher, vocab
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"response_format cannot be used: {self._matcher.get_error().splitlines()[0][:300]}")

    def allowed(self) -> Tensor:
        """(vocab,) bool. ConfigError if the grammar leads nowhere."""
        words = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check()
        bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        return bits.flatten()[: self._vocab].bool()

    def accept(self, token: int) -> None:
        """Go on after `token`."""
        self._matcher.consume_token(token)
        self._check()


def _llguidance() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise ConfigError("response_format needs the package llguidance: pip install 'qvl-edge[serve]'") from None


@functools.lru_cache(maxsize=4)  # a second for the published vocabulary
def _encoding(tokenizer: Tokenizer, vocab: int, stop_ids: frozenset[int]) -> Any:
    return importlib.import_module("llguidance.tiktoken").lltokenizer_from_encoding(
        tokenizer.encoding, n_vocab=vocab, eos_token=sorted(stop_ids)
    )
