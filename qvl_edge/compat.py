"""Upstream's names over Runtime, so that the snippets of Qwen-VL's README run with the import line changed.

    from qvl_edge.compat import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

Here token ids hold an image's path as upstream writes them: its bytes inside the 256 slots. The caller of this module
is the app, so `<img>path</img>` in a string opens that file, as upstream's README uses it. What differs from upstream:
`trust_remote_code` and `device_map="cpu"|"cuda"|"auto"` are accepted and need nothing; logits are not returned.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qvl_edge.config import IMAGE_TOKENS, read_json
from qvl_edge.engine.options import GenerationOptions
from qvl_edge.errors import ConfigError, PromptError
from qvl_edge.runtime import SYSTEM, Runtime
from qvl_edge.text.list_format import from_list_format, to_list_format
from qvl_edge.text.tokenizer import IMG, IMG_END, IMG_PAD, VOCAB_FILE, Tokenizer


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
    """generation_config.json as an object: attributes can be set, as snippets do (top_p, max_new_tokens …)."""

    def __init__(self, **values: Any):
        self.__dict__.update(values)

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], **overrides: Any) -> "GenerationConfig":
        """Read PATH/generation_config.json."""
        overrides.pop("trust_remote_code", None)
        return cls(**{**read_json(Path(path) / "generation_config.json"), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All settings."""
        return dict(self.__dict__)


class QWenLMHeadModel:
    """Upstream's model object over a Runtime."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.generation_config = GenerationConfig(**runtime.generation_config)
        self.device = runtime.decoder.device

    def eval(self) -> "QWenLMHeadModel":
        """Nothing to do; snippets call it."""
        return self

    def _options(self, generation_config: GenerationConfig | None, overrides: dict[str, Any]) -> dict[str, Any]:
        settings = (generation_config or self.generation_config).to_dict()
        options = GenerationOptions.from_config(settings | {k: v for k, v in overrides.items() if v is not None})
        return {f.name: getattr(options, f.name) for f in fields(options)}

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
        options = self._options(generation_config, overrides)
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
        return self.runtime.chat_stream(query, history, system, **self._options(generation_config, overrides))

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **overrides: Any) -> Tensor:
        """input_ids (1, T) from the tokenizer -> (1, T + new) int64, the prompt included, raw format."""
        if input_ids.shape[0] != 1:
            raise ConfigError(f"generate takes one sequence here, input_ids has {input_ids.shape[0]}")
        tokenizer = QWenTokenizer(self.runtime.tokenizer)
        ids = input_ids[0].tolist()
        spans = tokenizer.image_spans(ids)
        images = [tokenizer.path_of(ids[start:end]).decode("utf-8", errors="replace") for start, end in spans]
        answer = self.runtime.generate_ids(ids, [start for start, _ in spans], images, **self._options(None, overrides))
        return torch.tensor([ids + answer.token_ids])


class AutoTokenizer:
    """Upstream's way in."""

    @staticmethod
    def from_pretrained(path: str | PathLike[str], **ignored: Any) -> QWenTokenizer:
        """The tokenizer of a bundle or checkpoint."""
        del ignored  # trust_remote_code, revision, …: nothing is fetched or executed
        return QWenTokenizer(Tokenizer.from_file(Path(path) / VOCAB_FILE))


class AutoModelForCausalLM:
    """Upstream's way in."""

    @staticmethod
    def from_pretrained(
        path: str | PathLike[str],
        device_map: str = "auto",
        bf16: bool = False,
        fp16: bool = False,
        fp32: bool = False,
        trust_remote_code: bool = True,
        **options: Any,
    ) -> QWenLMHeadModel:
        """A bundle or checkpoint as upstream's model; `options` go to Runtime.from_pretrained."""
        del trust_remote_code  # no code of the checkpoint is ever run
        if bf16 + fp16 + fp32 > 1:
            raise ConfigError("at most one of bf16, fp16 and fp32 can be true")
        dtype = "bfloat16" if bf16 else "float16" if fp16 else "float32" if fp32 else None
        return QWenLMHeadModel(Runtime.from_pretrained(path, device=device_map, dtype=dtype, **options))
