"""Upstream's model, and its generation settings, over a Runtime."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvl_edge.checkpoint import ADAPTER_CONFIG
from qvl_edge.checkpoint import GENERATION as GENERATION_CONFIG
from qvl_edge.compat.arguments import GENERATION, LOADING, without_neutral, without_none
from qvl_edge.compat.tokenizer import QWenTokenizer
from qvl_edge.errors import ConfigError
from qvl_edge.files import read_json
from qvl_edge.hub import local_folder
from qvl_edge.options import GenerationOptions, Source
from qvl_edge.runtime import SYSTEM, Runtime


class GenerationConfig:
    """generation_config.json as an object: attributes can be set, as snippets do (top_p, max_new_tokens …).

    What it leaves open is as in transformers: greedy, and where sampling is asked for, from the likeliest 50 tokens.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __init__(self, **values: Any):
        self.__dict__.update(values)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        revision: str | None = None,
        source: Source = "hf",
        local_files_only: bool = False,
        **overrides: Any,
    ) -> "GenerationConfig":
        """Read PATH/generation_config.json; of a hub's model nothing else is fetched."""
        overrides = without_neutral(overrides, LOADING)
        folder = local_folder(
            path, source=source, revision=revision, only=(GENERATION_CONFIG,), local_files_only=local_files_only
        )
        return cls(**{**read_json(folder / GENERATION_CONFIG), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All settings."""
        return {name: getattr(self, name) for name in GenerationConfig.__annotations__} | self.__dict__


class QWenLMHeadModel:
    """Upstream's model object over a Runtime."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.generation_config = GenerationConfig(**runtime.generation_config)
        self.device, self.dtype = runtime.decoder.device, runtime.plan.dtype

    def eval(self) -> "QWenLMHeadModel":
        """Nothing to do; snippets call it."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "QWenLMHeadModel":
        """ConfigError for True: nothing is trained here."""
        if requires_grad:
            raise ConfigError("the weights take no gradients; train with upstream's finetune.py")
        return self

    def to(self, *places: Any, device: Any = None, dtype: torch.dtype | None = None) -> "QWenLMHeadModel":
        """The model, which is there, or of this dtype, already. ConfigError if not: after loading nothing moves."""
        for place in (*places, device, dtype):
            if place is not None:
                self._require(place)
        return self

    def _require(self, place: "str | int | torch.device | torch.dtype") -> None:
        if isinstance(place, torch.dtype):
            found, flag = self.dtype == place, f"torch_dtype={place}"
        else:
            wanted = torch.device(_device(place))
            found = wanted.type == self.device.type and wanted.index in (None, self.device.index or 0)
            flag = f"device_map={str(wanted)!r}"
        if not found:
            raise ConfigError(
                f"the model is on {self.device} in {self.dtype} and stays so; load it with {flag} in from_pretrained"
            )

    def cuda(self, device: "int | torch.device | None" = None) -> "QWenLMHeadModel":
        """See `to`."""
        return self.to("cuda" if device is None else device)

    def cpu(self) -> "QWenLMHeadModel":
        """See `to`."""
        return self.to("cpu")

    def half(self) -> "QWenLMHeadModel":
        """See `to`."""
        return self.to(torch.float16)

    def bfloat16(self) -> "QWenLMHeadModel":
        """See `to`."""
        return self.to(torch.bfloat16)

    def float(self) -> "QWenLMHeadModel":
        """See `to`."""
        return self.to(torch.float32)

    def _options(self, generation_config: GenerationConfig | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
        settings = (generation_config or self.generation_config).to_dict()
        without_neutral({name: settings[name] for name in settings.keys() & GENERATION.keys()}, GENERATION)
        given = without_none(without_neutral(overrides, GENERATION))
        given.pop("pad_token_id", None)  # of the padding in a result
        self._check_end(given.pop("eos_token_id", None))
        options = GenerationOptions.from_config(settings).with_overrides(given)
        if options.do_sample and options.seed is None:  # so that torch.manual_seed before a call decides its answer
            options = replace(options, seed=int(torch.randint(2**63 - 1, ())))
        return {f.name: getattr(options, f.name) for f in fields(options)}

    def _check_end(self, ids: "int | Iterable[int] | None") -> None:
        """ConfigError for an eos_token_id that is not the model's."""
        specials = self.runtime.tokenizer.specials
        known = {specials[token] for token in ("<|endoftext|>", "<|im_end|>", "<|im_start|>")}
        given = {ids} if isinstance(ids, int) else set(ids or ())
        if ids is not None and not (specials["<|endoftext|>"] in given and given <= known):
            raise ConfigError(
                f"eos_token_id is {ids}, the model's is {specials['<|endoftext|>']}; to end an answer elsewhere give "
                "stop=[text]"
            )

    def _chat_options(self, generation_config: GenerationConfig | None, overrides: dict[str, Any]) -> dict[str, Any]:
        """ConfigError for a base model, as upstream asserts."""
        found = (generation_config or self.generation_config).to_dict().get("chat_format", "chatml")
        if found != "chatml":
            raise ConfigError(
                f"chat_format is {found!r} in the generation config: a base model, which was not taught to chat; use "
                "generate, or load the Chat model"
            )
        return self._options(generation_config, overrides)

    def chat(
        self,
        tokenizer: QWenTokenizer,
        query: str,
        history: list[tuple[str, str]] | None,
        system: str = SYSTEM,
        append_history: bool = True,
        generation_config: GenerationConfig | None = None,
        **overrides: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """(response, history); with append_history=False the given list is returned as it was."""
        options = self._chat_options(generation_config, overrides)
        response, _ = self.runtime.chat(query, history, system, **options)
        history = [] if history is None else history
        if append_history:
            history.append((query, response))  # upstream extends the caller's list in place
        return response, history

    def chat_stream(
        self,
        tokenizer: QWenTokenizer,
        query: str,
        history: list[tuple[str, str]] | None,
        system: str = SYSTEM,
        generation_config: GenerationConfig | None = None,
        **overrides: Any,
    ) -> Iterator[str]:
        """Cumulative text."""
        return self.runtime.chat_stream(query, history, system, **self._chat_options(generation_config, overrides))

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        inputs: Tensor | None = None,
        **overrides: Any,
    ) -> Tensor:
        """input_ids (B, T) from the tokenizer -> (B, T + new) int64 on the CPU, the prompts included, raw format.

        Padding, where attention_mask (B, T) is 0 before or after a text, has no part in its answer. Rows that end early
        are filled up with pad_token_id.
        """
        ids = inputs if input_ids is None else input_ids
        if ids is None or ids.ndim != 2 or (input_ids is not None and inputs is not None):
            raise ConfigError(f"generate takes input_ids of shape (B, T), this is {None if ids is None else ids.shape}")
        rows = _without_padding(ids, attention_mask)
        pad = overrides.get("pad_token_id")
        length = overrides.pop("max_length", None)
        if length is not None and overrides.get("max_new_tokens") is None:  # of prompt and answer, as in transformers
            if length <= ids.shape[1]:
                raise ConfigError(f"max_length is {length}, the prompt has {ids.shape[1]} tokens; give max_new_tokens")
            overrides["max_new_tokens"] = length - ids.shape[1]
        options = self._options(generation_config, overrides)
        answers = [self._continue(row, options) for row in rows]
        fill = self.runtime.tokenizer.specials["<|endoftext|>"] if pad is None else int(pad)
        width = max(map(len, answers))
        new = torch.tensor([answer + [fill] * (width - len(answer)) for answer in answers])
        return torch.cat([ids.cpu(), new.to(ids.dtype)], 1)

    def _continue(self, ids: list[int], options: dict[str, Any]) -> list[int]:
        tokenizer = QWenTokenizer(self.runtime.tokenizer)
        spans = tokenizer.image_spans(ids)
        images = [tokenizer.path_of(ids[start:end]).decode("utf-8", errors="replace") for start, end in spans]
        return list(self.runtime.generate_ids(ids, [start for start, _ in spans], images, **options).token_ids)


def _without_padding(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The rows of `ids` (B, T) where `mask` is not 0. ConfigError for zeros between ones, which are not padding."""
    if mask is None:
        return [row.tolist() for row in ids]
    if mask.shape != ids.shape:
        raise ConfigError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}")
    rows = []
    for number, (row, kept) in enumerate(zip(ids, mask.bool(), strict=True)):
        places = kept.nonzero().flatten()
        if not len(places) or len(places) != int(places[-1] - places[0]) + 1:
            what = "only zeros" if not len(places) else "zeros between ones"
            raise ConfigError(
                f"row {number} of attention_mask has {what}; only padding before or after a text is masked"
            )
        rows.append(row[kept].tolist())
    return rows


class AutoModelForCausalLM:
    """Upstream's way in."""

    @staticmethod
    def from_pretrained(
        path: str | PathLike[str],
        device_map: Any = "auto",
        bf16: bool = False,
        fp16: bool = False,
        fp32: bool = False,
        torch_dtype: "torch.dtype | str | None" = None,
        dtype: "torch.dtype | str | None" = None,
        **options: Any,
    ) -> QWenLMHeadModel:
        """A bundle or checkpoint as upstream's model; `options` (revision, source, …) go to Runtime.from_pretrained.

        device_map: "auto", "cpu", "cuda", "cuda:1", 1, a torch.device, or one of these under the key "" of a dict.
        dtype: transformers' later name of torch_dtype. Its options that choose how files are read need nothing here.
        """
        flags = {"bfloat16": bf16, "float16": fp16, "float32": fp32}
        asked = {name for name, given in flags.items() if given}
        asked |= {str(one).removeprefix("torch.") for one in (torch_dtype, dtype) if one not in (None, "auto")}
        if len(asked) > 1:
            raise ConfigError("at most one of bf16, fp16, fp32 and torch_dtype can be given")
        options = {"device": _device(device_map)} | without_none(without_neutral(options, LOADING))
        options["dtype"] = next(iter(asked), None)
        return QWenLMHeadModel(Runtime.from_pretrained(path, **options))


class AutoPeftModelForCausalLM:
    """PEFT's way to a LoRA adapter, which is merged into its base as that is loaded."""

    @staticmethod
    def from_pretrained(path: str | PathLike[str], **options: Any) -> QWenLMHeadModel:
        """The base that the adapter names, with the adapter; options: those of AutoModelForCausalLM.

        ConfigError if the base is quantized: its levels take no adapter.
        """
        base = read_json(Path(path) / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not base:
            raise ConfigError(
                f"{Path(path) / ADAPTER_CONFIG} names no base_model_name_or_path; use "
                f"AutoModelForCausalLM.from_pretrained(BASE, lora={str(path)!r})"
            )
        return AutoModelForCausalLM.from_pretrained(base, lora=str(path), **options)


def _device(device_map: Any) -> str:
    """The device that a device_map names. ConfigError for a model spread over several."""
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise ConfigError(
                f"device_map has the parts {', '.join(map(str, device_map))[:80]}; the model is on one device here, "
                "such as device_map='cuda:0', and `release_vision` and `embeddings` say what else is kept where"
            )
        device_map = device_map[""]
    if device_map in (None, "balanced", "balanced_low_0", "sequential"):  # what these come to on one device
        return "auto"
    return f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map)
