"""Upstream's tokenizer: token ids that hold the paths of images."""

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qvl_edge.compat.arguments import ANY, refuse_unknown, without_neutral
from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.errors import ConfigError, PromptError
from qvl_edge.hub import local_folder
from qvl_edge.options import Source
from qvl_edge.runtime import Runtime
from qvl_edge.text.list_format import from_list_format, to_list_format
from qvl_edge.text.tokenizer import IMG, IMG_END, IMG_PAD, VOCAB_FILE, Tokenizer

# of a tokenizer call: what upstream's tokenizer does anyway, or has nothing of
TOKENIZING = {
    **dict.fromkeys(("add_special_tokens", "return_attention_mask", "verbose", "disallowed_special"), ANY),
    **dict.fromkeys(("text_pair", "text_target", "pad_to_multiple_of"), None),
    **dict.fromkeys(("return_token_type_ids", "return_overflowing_tokens", "return_length"), False),
    **dict.fromkeys(("return_offsets_mapping", "return_special_tokens_mask", "is_split_into_words", "stride"), False),
    "allowed_special": "all",
}
_OPTIONS = ("return_tensors", "padding", "truncation", "max_length", "padding_side")


def _padded(row: list[int], width: int, value: int, side: str) -> list[int]:
    padding = [value] * (width - len(row))
    return padding + row if side == "left" else row + padding


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

    def __init__(self, tokenizer: Tokenizer, padding_side: str = "right", model_max_length: int | None = None):
        if padding_side not in ("left", "right"):
            raise ConfigError(f"padding_side is {padding_side!r}, known are 'left' and 'right'")
        self.core, self.padding_side, self.model_max_length = tokenizer, padding_side, model_max_length
        self.img_start_id, self.img_end_id, self.img_pad_id = (tokenizer.specials[t] for t in (IMG, IMG_END, IMG_PAD))
        self.eod_id = tokenizer.specials["<|endoftext|>"]
        self.im_start_id, self.im_end_id = tokenizer.specials["<|im_start|>"], tokenizer.specials["<|im_end|>"]
        self.eos_token = self.pad_token = "<|endoftext|>"
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

    def encode(
        self,
        text: str,
        allowed_special: Iterable[str] | str = "all",
        *,
        return_tensors: str | None = None,
        **options: Any,
    ) -> Any:
        """Token ids as upstream makes them: the bytes of an image's path, padded to 256, between <img> and </img>.

        A list, or with return_tensors="pt" a tensor (1, T).
        PromptError (ValueError) for an <img> left open and for a path of more than 256 bytes: such a path does not fit
        into the slots; Runtime.chat takes it, since there images travel beside the ids.
        """
        if return_tensors is None and not options:
            return self._ids(text, allowed_special)
        ids = self([text], return_tensors=return_tensors, **options)["input_ids"]
        return ids if return_tensors else ids[0]

    def _ids(self, text: str, allowed_special: Iterable[str] | str = "all") -> list[int]:
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

    def __call__(
        self,
        text: str | Sequence[str],
        return_tensors: str | None = None,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        padding_side: str | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """{"input_ids", "attention_mask"} of a text or a list: lists, or int64 tensors (B, T) with return_tensors="pt".

        padding: True or "longest", or "max_length", with pad_token_id on the padding_side. Nothing is cut: ConfigError
        for a text that truncation would shorten, and for options that are not known.
        """
        if return_tensors not in (None, "pt"):
            raise ConfigError(f"return_tensors is {return_tensors!r}; 'pt' or None are supported")
        if left := without_neutral(options, TOKENIZING):
            raise ConfigError(f"unknown tokenizer option {sorted(left)[0]!r}; known are {', '.join(_OPTIONS)}")
        if padding not in (False, None, True, "longest", "max_length", "do_not_pad"):
            raise ConfigError(f"padding is {padding!r}, known are True, False, 'longest' and 'max_length'")
        max_length = self.model_max_length if max_length is None else max_length
        rows = [self._ids(one) for one in ([text] if isinstance(text, str) else text)]
        longest = max(map(len, rows), default=0)
        if truncation not in (False, None, "do_not_truncate") and max_length is not None and longest > max_length:
            raise ConfigError(
                f"a text has {longest} tokens and max_length is {max_length}; cutting one could cut an image in two: "
                "shorten the text"
            )
        masks = [[1] * len(row) for row in rows]
        if padding not in (False, None, "do_not_pad"):
            width = max(longest, max_length or 0) if padding == "max_length" else longest
            side = padding_side or self.padding_side
            rows = [_padded(row, width, self.pad_token_id, side) for row in rows]
            masks = [_padded(mask, width, 0, side) for mask in masks]
        if return_tensors is None:
            single = isinstance(text, str)
            return BatchEncoding(input_ids=rows[0] if single else rows, attention_mask=masks[0] if single else masks)
        if len({len(row) for row in rows}) > 1:
            raise ConfigError(
                f"the texts have {', '.join(str(len(row)) for row in rows)} tokens, which make no tensor; padding=True "
                "makes them equally long"
            )
        return BatchEncoding(input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks))

    def decode(self, ids: "Tensor | Iterable[int] | int", skip_special_tokens: bool = False, **options: Any) -> str:
        """Text of token ids; the slots of an image become its path again."""
        if left := without_neutral(options, {"clean_up_tokenization_spaces": ANY, "errors": "replace"}):
            raise ConfigError(f"unknown option {sorted(left)[0]!r} of decode; skip_special_tokens is known")
        if isinstance(ids, int):
            ids = [ids]
        return self.core.decode(
            ids.tolist() if isinstance(ids, Tensor) else ids, skip_special_tokens=skip_special_tokens
        )

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """The text of each row."""
        return [self.decode(row, skip_special_tokens, **options) for row in rows]

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


class AutoTokenizer:
    """Upstream's way in."""

    @staticmethod
    def from_pretrained(
        path: str | PathLike[str],
        *,
        revision: str | None = None,
        source: Source = "hf",
        local_files_only: bool = False,
        padding_side: str = "right",
        model_max_length: int | None = None,
        **options: Any,
    ) -> QWenTokenizer:
        """The tokenizer of a bundle or checkpoint; of a hub's model nothing else is fetched."""
        refuse_unknown(options)
        folder = local_folder(
            path, source=source, revision=revision, only=(VOCAB_FILE,), local_files_only=local_files_only
        )
        return QWenTokenizer(Tokenizer.from_file(folder / VOCAB_FILE), padding_side, model_max_length)
