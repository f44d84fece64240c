"""Upstream's names over Runtime, so that the snippets of Qwen-VL's README run with the import line changed.

    from qvl_edge.compat import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, snapshot_download

A path is a folder, or the name of a model on a hub (source="hf" or "modelscope"), which is fetched. Token ids hold an
image's path as upstream writes them: its bytes inside the 256 slots. The caller of this module is the app, so
`<img>path</img>` in a string opens that file, as upstream's README uses it. Every snippet of upstream's README and
TUTORIAL, and what differs: docs/parity.md.
"""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor

from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.errors import ConfigError, PromptError
from qvl_edge.files import read_json
from qvl_edge.hub import local_folder
from qvl_edge.lora import ADAPTER_CONFIG
from qvl_edge.options import GenerationOptions, Source
from qvl_edge.runtime import SYSTEM, Runtime
from qvl_edge.text.list_format import from_list_format, to_list_format
from qvl_edge.text.tokenizer import IMG, IMG_END, IMG_PAD, VOCAB_FILE, Tokenizer

GENERATION_FILE = "generation_config.json"
WITHOUT_EFFECT = (
    *("trust_remote_code", "use_safetensors", "low_cpu_mem_usage", "resume_download"),
    *("use_fast", "padding_side", "user_agent"),
)


def _refuse(options: Mapping[str, Any]) -> None:
    """ConfigError for options that would be dropped: those of transformers that need nothing are WITHOUT_EFFECT."""
    if unknown := sorted(set(options) - set(WITHOUT_EFFECT)):
        raise ConfigError(
            f"{', '.join(unknown)} cannot be chosen here; caches are those of HF_HOME and MODELSCOPE_CACHE"
        )


class BatchEncoding(dict[str, Any]):
    """What a tokenizer call returns: input_ids and attention_mask, with `.to(device)` and attribute access."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> "BatchEncoding":
        """A copy with its tensors on `device`."""
        return BatchEncoding({k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.items()})


class QWenTokenizer:
    """Upstream's tokenizer: image paths inside the token ids, list format, drawing."""

    def __init__(self, tokenizer: Tokenizer):
        self.core = tokenizer
        self.img_start_id, self.img_end_id, self.img_pad_id = (tokenizer.specials[t] for t in (IMG, IMG_END, IMG_PAD))
        self.eod_id = tokenizer.specials["<|endoftext|>"]
        self.im_start_id, self.im_end_id = tokenizer.specials["<|im_start|>"], tokenizer.specials["<|im_end|>"]
        self.eos_token_id = self.pad_token_id = self.eod_id

    def __len__(self) -> int:
        return self.core.vocab_size

    from_list_format = staticmethod(from_list_format)
    to_list_format = staticmethod(to_list_format)

    @staticmethod
    def draw_bbox_on_latest_picture(response: str, history: list[tuple[str, str]] | None = None) -> Image.Image | None:
        """The latest picture with the boxes of `response`; without a history, a picture that `response` itself names.

        The second is for the base model, whose decoded output begins with its prompt.
        """
        return Runtime.draw_bbox_on_latest_picture(response, history if history is not None else [(response, "")])

    def encode(self, text: str, allowed_special: Iterable[str] | str = "all") -> list[int]:
        """Token ids as upstream makes them: the bytes of an image's path, padded to 256, between <img> and </img>.

        PromptError (ValueError) for an <img> left open and for a path of more than 256 bytes: such a path does not fit
        into the slots; Runtime.chat takes it, since there images travel beside the ids.
        """
        allowed = set(self.core.specials) if allowed_special == "all" else set(allowed_special)
        ids, slots, result = self.core.encode(text, allowed | {IMG, IMG_END, IMG_PAD}), -1, list[int]()
        for token in ids:
            result.append(token)
            if token == self.img_start_id and slots < 0:
                slots = len(result)
            elif token == self.img_end_id and slots >= 0:
                path = self.core.decode_bytes(result[slots:-1])
                result[slots:] = [*self._path_slots(path), self.img_end_id]
                slots = -1
        if slots >= 0:
            raise PromptError(f"an {IMG} is not closed by {IMG_END}: {text[:80]!r}")
        return result

    def _path_slots(self, path: bytes) -> list[int]:
        if len(path) > IMAGE_TOKENS:
            raise PromptError(
                f"the image path has {len(path)} bytes, its slots hold {IMAGE_TOKENS}; use a shorter path, or "
                "qvl_edge.Runtime.chat, which has no such limit"
            )
        # upstream writes byte values, not the ids of these bytes (tokenization_qwen.py: _replace_closed_tag)
        return [*path, *[self.img_pad_id] * (IMAGE_TOKENS - len(path))]

    def __call__(self, text: str, return_tensors: str | None = None) -> BatchEncoding:
        """{"input_ids", "attention_mask"}: lists, or tensors (1, T) int64 with return_tensors="pt"."""
        ids = self.encode(text)
        if return_tensors is None:
            return BatchEncoding(input_ids=ids, attention_mask=[1] * len(ids))
        if return_tensors != "pt":
            raise ConfigError(f"return_tensors is {return_tensors!r}; 'pt' or None are supported")
        tensor = torch.tensor([ids])
        return BatchEncoding(input_ids=tensor, attention_mask=torch.ones_like(tensor))

    def decode(self, ids: "Tensor | Iterable[int] | int", skip_special_tokens: bool = False) -> str:
        """Text of token ids; the slots of an image become its path again."""
        if isinstance(ids, int):
            ids = [ids]
        return self.core.decode(
            ids.tolist() if isinstance(ids, Tensor) else ids, skip_special_tokens=skip_special_tokens
        )

    def image_spans(self, ids: list[int]) -> list[tuple[int, int]]:
        """(first slot, one past the last slot) of every image in `ids`."""
        spans, start = [], -1
        for index, token in enumerate(ids):
            if token == self.img_start_id and start < 0:
                start = index + 1
            elif token == self.img_end_id and start >= 0:
                spans.append((start, index))
                start = -1
        return spans

    def path_of(self, slots: list[int]) -> bytes:
        """The path written into an image's slots."""
        return bytes(slot for slot in slots if slot != self.img_pad_id and slot < 256)


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
        overrides.pop("trust_remote_code", None)
        folder = local_folder(
            path, source=source, revision=revision, only=(GENERATION_FILE,), local_files_only=local_files_only
        )
        return cls(**{**read_json(folder / GENERATION_FILE), **overrides})

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

    def to(self, place: "str | int | torch.device | torch.dtype") -> "QWenLMHeadModel":
        """The model, which is there, or of this dtype, already. ConfigError if not: after loading nothing moves."""
        if isinstance(place, torch.dtype):
            found, flag = self.dtype == place, f"torch_dtype={place}"
        else:
            device = torch.device(_device(place))
            found = device.type == self.device.type and device.index in (None, self.device.index or 0)
            flag = f"device_map={str(device)!r}"
        if not found:
            raise ConfigError(
                f"the model is on {self.device} in {self.dtype} and stays so; load it with {flag} in from_pretrained"
            )
        return self

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

    def _options(self, generation_config: GenerationConfig | None, overrides: dict[str, Any]) -> dict[str, Any]:
        settings = (generation_config or self.generation_config).to_dict()
        given = {name: value for name, value in overrides.items() if value is not None}
        options = GenerationOptions.from_config(settings).with_overrides(given)
        if options.do_sample and options.seed is None:  # so that torch.manual_seed before a call decides its answer
            options = replace(options, seed=int(torch.randint(2**63 - 1, ())))
        return {f.name: getattr(options, f.name) for f in fields(options)}

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
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **overrides: Any,
    ) -> Tensor:
        """input_ids (1, T) from the tokenizer -> (1, T + new) int64 on the CPU, the prompt included, raw format."""
        if input_ids.shape[0] != 1:
            raise ConfigError(f"generate takes one sequence here, input_ids has {input_ids.shape[0]}")
        tokenizer = QWenTokenizer(self.runtime.tokenizer)
        ids = input_ids[0].tolist()
        spans = tokenizer.image_spans(ids)
        images = [tokenizer.path_of(ids[start:end]).decode("utf-8", errors="replace") for start, end in spans]
        options = self._options(generation_config, overrides)
        answer = self.runtime.generate_ids(ids, [start for start, _ in spans], images, **options)
        return torch.tensor([ids + answer.token_ids])


class AutoTokenizer:
    """Upstream's way in."""

    @staticmethod
    def from_pretrained(
        path: str | PathLike[str],
        *,
        revision: str | None = None,
        source: Source = "hf",
        local_files_only: bool = False,
        **options: Any,
    ) -> QWenTokenizer:
        """The tokenizer of a bundle or checkpoint; of a hub's model nothing else is fetched."""
        _refuse(options)
        folder = local_folder(
            path, source=source, revision=revision, only=(VOCAB_FILE,), local_files_only=local_files_only
        )
        return QWenTokenizer(Tokenizer.from_file(folder / VOCAB_FILE))


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
        **options: Any,
    ) -> QWenLMHeadModel:
        """A bundle or checkpoint as upstream's model; `options` (revision, source, …) go to Runtime.from_pretrained.

        device_map: "auto", "cpu", "cuda", "cuda:1", 1, a torch.device, or one of these under the key "" of a dict.
        Options of transformers that choose how files are read (WITHOUT_EFFECT) are taken and need nothing.
        """
        flags = {"bfloat16": bf16, "float16": fp16, "float32": fp32}
        asked = [name for name, given in flags.items() if given]
        if torch_dtype not in (None, "auto"):
            asked.append(str(torch_dtype).removeprefix("torch."))
        if len(asked) > 1:
            raise ConfigError("at most one of bf16, fp16, fp32 and torch_dtype can be given")
        options = {name: value for name, value in options.items() if name not in WITHOUT_EFFECT}
        dtype = asked[0] if asked else None
        return QWenLMHeadModel(Runtime.from_pretrained(path, device=_device(device_map), dtype=dtype, **options))


class AutoPeftModelForCausalLM:
    """PEFT's way to a LoRA adapter, which here is merged while a bundle is made."""

    @staticmethod
    def from_pretrained(path: str | PathLike[str], **ignored: Any) -> NoReturn:
        """ConfigError with the two commands for this adapter and the base that it names."""
        del ignored
        adapter = shlex.quote(str(path))
        base = shlex.quote(str(read_json(Path(path) / ADAPTER_CONFIG).get("base_model_name_or_path") or "CHECKPOINT"))
        raise ConfigError(
            f"{path} is an adapter, which is merged while a bundle is made:\n"
            f"  python -m quantize.gptq {base} BUNDLE --lora {adapter} --calibration conversations.json\n"
            f"  python -m export.vit {base} BUNDLE --lora {adapter}\n"
            "load BUNDLE with AutoModelForCausalLM then"
        )


def snapshot_download(
    model_id: str,
    revision: str | None = None,
    *,
    source: Source = "modelscope",
    local_files_only: bool = False,
    **options: Any,
) -> str:
    """The folder of a hub's model, fetched if need be: ModelScope's name, whose hub upstream's README takes it from."""
    _refuse(options)
    return str(local_folder(model_id, source=source, revision=revision, local_files_only=local_files_only))


def _device(device_map: Any) -> str:
    """The device that a device_map names. ConfigError for a model spread over several."""
    if isinstance(device_map, Mapping):
        if set(device_map) != {""}:
            raise ConfigError(
                f"device_map has the parts {', '.join(map(str, device_map))[:80]}; the model is on one device here, "
                "such as device_map='cuda:0', and `release_vision` and `embeddings` say what else is kept where"
            )
        device_map = device_map[""]
    return f"cuda:{device_map}" if isinstance(device_map, int) else str(device_map or "auto")
