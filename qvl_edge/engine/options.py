"""Generation options under their Hugging Face names, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from qvl_edge.errors import ConfigError

MOST_LOGPROBS = 20  # as OpenAI's top_logprobs


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated; defaults come from the model's generation_config.json."""

    max_new_tokens: int = 512
    min_new_tokens: int = 0  # the model's own end does not come before so many tokens
    do_sample: bool = True  # False: greedy, the other sampling options but repetition_penalty have no effect
    temperature: float = 1.0
    top_p: float = 1.0  # smallest set of tokens whose probabilities add up to it
    top_k: int = 0  # 0: all tokens
    repetition_penalty: float = (
        1.0  # logits of tokens seen so far are divided (positive) or multiplied (negative) by it
    )
    seed: int | None = None  # None: different at every call
    stop: tuple[str, ...] = ()  # strings that end the answer; they are not part of it
    logprobs: int | None = None  # log-probabilities of each token and of so many likeliest ones; None: of none
    response_format: Mapping[str, Any] | None = None  # as OpenAI's, see engine.constraint; None: anything may come
    ignore_eos: bool = False  # go on past the model's own end, to max_new_tokens: for benchmarks

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            ("temperature", self.temperature > 0, "more than 0; for greedy decoding use do_sample=False"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0"),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"0 to {MOST_LOGPROBS}, or None",
            ),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "a string or strings, none of them empty"),
        )
        for name, valid, expected in checks:
            if not valid:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    @classmethod
    def from_config(cls, generation_config: Mapping[str, Any]) -> "GenerationOptions":
        """From a parsed generation_config.json; keys that are no options of ours are ignored."""
        known = {field.name for field in fields(cls)}
        values = {k: v for k, v in generation_config.items() if k in known and v is not None}
        if values.get("temperature") == 0:  # some fine-tunes write it for greedy decoding
            values |= {"temperature": 1.0, "do_sample": False}
        return cls(**values)

    def with_overrides(self, overrides: Mapping[str, Any]) -> "GenerationOptions":
        """A copy with `overrides`; a misspelt name is an error that lists the known ones."""
        known = {field.name for field in fields(self)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ConfigError(f"unknown generation option {unknown[0]!r}; known are {', '.join(sorted(known))}")
        return replace(self, **overrides)
