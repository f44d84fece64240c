"""Every option of loading and of generating: its type, default, range and help, stated once.

The Python API, the commands, the server's schema and the table in docs/options.md are all filled from the two classes
at the end of this file, and every value is checked by them: ConfigError names the option, the value and what is taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

from qvl_edge.errors import ConfigError
from qvl_edge.option import INT32_MAX, INT64, Options, converted, option

Dtype = Literal["float32", "bfloat16", "float16"]
"""Compute dtype, and that of the layers that are not int4."""
Head = Literal["auto", "float16", "int8"]
"""lm_head: in the compute dtype (auto, float16), or weight-only int8."""
KVType = Literal["auto", "float16", "int8"]
"""Keys and values: in the compute dtype (auto, float16), or int8 with one scale per token and head."""
Activations = Literal["float", "int8"]
"""On a CPU, what the products with int4 layers and an int8 lm_head read: rows of float32, or rounded to int8."""
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

MAX_LOGPROBS = 20  # as OpenAI's top_logprobs
MAX_BIAS = 100  # of logit_bias, either way, as OpenAI
MIN_TEMPERATURE = 1e-3  # below it logits / temperature overflows float32, and sampling is greedy anyway
# given without do_sample, each of these turns sampling on, unless it has the value that asks for nothing
SAMPLING = {"temperature": None, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None}


@dataclass(frozen=True)
class LoadOptions(Options):
    """How a model is loaded."""

    noun: ClassVar[str] = "loading option"

    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto is CUDA where torch sees it", metavar="DEVICE")
    dtype: Dtype | None = option(None, "compute dtype (default: float32 on a CPU, float16 on CUDA)")
    profile: Literal["auto", "12g", "8g", "6g"] = option(
        "auto",
        "12g: nothing outside the int4 layers is lost; 8g: vision tower, lm_head and KV cache in int8; 6g: the tower "
        "in int4; auto: the first that fits into free memory",
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
    activations: Activations | None = option(
        None,
        "on a CPU, what products with int4 layers and an int8 lm_head read: rounded to int8 (the default), or float: "
        "exact, slower, and the default of --dtype float32",
    )
    threads: int | None = option(
        None, "CPU threads (default: OMP_NUM_THREADS, or the cores that the process may use, at most a container's)",
        least=1, most=1024, metavar="N",
    )  # fmt: skip
    embeddings: Embeddings = option("host", "embedding table: read from the mapped file, or on the device")
    vision_device: str | None = option(
        None,
        "where images are encoded: cpu, cuda, cuda:N, or openvino: on a CPU too, faster, for more memory "
        "(default: --device)", metavar="DEVICE",
    )  # fmt: skip
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

    def activations_on(self, device: str) -> Activations:
        """Those of a model on `device`. ConfigError if it cannot have those that were asked for.

        On a CPU int8, which the synthetic suite cannot tell from float (docs/compression.md), and which is up to four
        times as fast; but whoever names float32 wants it throughout.
        """
        if device == "cpu":
            return self.activations or ("float" if self.dtype == "float32" else "int8")
        if self.activations == "int8":
            raise ConfigError(
                f"activations is 'int8' and the model runs on {device}, whose kernels take floats; leave it out, or "
                "take the CPU: --device cpu (in Python device='cpu'; for fit, --cpu)"
            )
        return "float"

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
        bias = converted(float, value)[0]
        if not (name.isascii() and name.isdigit()) or len(name) > 10 or bias is None or abs(bias) > MAX_BIAS:
            raise ConfigError(
                f"logit_bias is {{{key!r:.40}: {value!r:.40}}}, expected token ids with numbers from -{MAX_BIAS} to "
                f"{MAX_BIAS}"
            )
        found[int(name)] = bias
    return found
