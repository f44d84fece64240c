"""What may come next: boxes by a grammar of our own, JSON by llguidance, no end before min_new_tokens."""

import functools
import importlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qvl_edge.engine.sampling import Constraint
from qvl_edge.errors import ConfigError
from qvl_edge.text.box_grammar import BoxGrammar, BoxTables
from qvl_edge.text.tokenizer import Tokenizer

FORMATS = ("text", "boxes", "json_object", "json_schema")
MOST_SCHEMA = 100_000  # characters of a schema


def constraint_for(
    response_format: Mapping[str, Any] | None, tokenizer: Tokenizer, vocab: int, stop_ids: frozenset[int]
) -> Constraint | None:
    """The constraint of one answer; None where anything may come.

    response_format as OpenAI writes it: {"type": "text"}, {"type": "json_object"}, {"type": "json_schema",
    "json_schema": {"schema": {…}}}; and {"type": "boxes"}, whose boxes are well formed. ConfigError says what is wrong
    with it.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind not in FORMATS:
        raise ConfigError(f"response_format has type {kind!r}, known are {', '.join(map(repr, FORMATS))}")
    if kind == "text":
        return None
    if kind == "boxes":
        return BoxGrammar(_box_tables(tokenizer, vocab, stop_ids))
    schema: Any = {"type": "object"}
    if kind == "json_schema":
        given = response_format.get("json_schema")
        schema = given.get("schema") if isinstance(given, Mapping) else None
        if not isinstance(schema, Mapping):
            raise ConfigError('response_format has no schema; expected {"json_schema": {"schema": {…}}}')
    return JsonGrammar(_json_tokenizer(tokenizer, vocab, stop_ids), json.dumps(schema), vocab)


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


class JsonGrammar:
    """JSON that keeps to a schema, then the end of the answer."""

    def __init__(self, tokenizer: Any, schema: str, vocab: int):
        if len(schema) > MOST_SCHEMA:
            raise ConfigError(f"the JSON schema has {len(schema)} characters, at most {MOST_SCHEMA} are taken")
        matcher = _llguidance().LLMatcher
        # without free whitespace: a small model may go on with blanks for ever
        options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            grammar = matcher.grammar_from_json_schema(schema, overrides=options)
        except ValueError as error:
            raise ConfigError(f"the JSON schema cannot be used: {error}") from None
        self._matcher, self._vocab = matcher(tokenizer, grammar, log_level=0), vocab
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"the JSON schema cannot be used: {self._matcher.get_error().splitlines()[0][:300]}")

    def allowed(self) -> Tensor:
        """(vocab,) bool. ConfigError if the schema leads nowhere."""
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
        raise ConfigError(
            "response_format with JSON needs the package llguidance: pip install 'qvl-edge[serve]'"
        ) from None


@functools.lru_cache(maxsize=4)  # a second for the published vocabulary
def _json_tokenizer(tokenizer: Tokenizer, vocab: int, stop_ids: frozenset[int]) -> Any:
    _llguidance()
    return importlib.import_module("llguidance.tiktoken").lltokenizer_from_encoding(
        tokenizer.encoding, n_vocab=vocab, eos_token=sorted(stop_ids)
    )


@functools.lru_cache(maxsize=4)
def _box_tables(tokenizer: Tokenizer, vocab: int, stop_ids: frozenset[int]) -> BoxTables:
    return BoxTables(tokenizer, vocab, stop_ids)
