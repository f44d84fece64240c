"""The options of options.py as keyword arguments, for editors and type checkers; a test holds both together."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict

from qvl_edge.options import Activations, Dtype, Embeddings, Head, KVType, Source


class LoadArguments(TypedDict, total=False):
    """Of Runtime.from_pretrained; docs/options.md says what each means."""

    device: str
    dtype: Dtype | None
    profile: Literal["auto", "12g", "8g", "6g"]
    max_context: int | None
    slots: int
    max_memory: str | int | None
    kv_cache: KVType | None
    head: Head | None
    activations: Activations | None
    threads: int | None
    embeddings: Embeddings
    vision_device: str | None
    release_vision: bool
    lookup: int
    chat_format: Literal["chatml", "raw"] | None
    lora: str | PathLike[str] | None
    background: str
    verify: bool
    source: Source
    revision: str | None
    local_files_only: bool
    cache_dir: str | PathLike[str] | None


class GenerationArguments(TypedDict, total=False):
    """Of everything that generates text; None is the model's own setting."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: int | Sequence[int] | None
    logprobs: int | None
    response_format: Mapping[str, Any] | None
    ignore_eos: bool | None
