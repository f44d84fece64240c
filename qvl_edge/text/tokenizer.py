"""Qwen-VL's tokenizer: tiktoken over qwen.tiktoken, plus the special tokens in upstream's order.

Source: Qwen-VL-Chat's tokenization_qwen.py. Images travel beside the text, so there is no path in the token ids here:
`encode` knows text and markup only, and `prompt.py` puts the image slots in.
"""

import base64
import binascii
import codecs
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import regex
import tiktoken

from qvl_edge.config import Config
from qvl_edge.errors import CheckpointError, ConfigError
from qvl_edge.files import read_bytes

VOCAB_FILE = "qwen.tiktoken"
ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
REF, REF_END, BOX, BOX_END, QUAD, QUAD_END = "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"
IMG, IMG_END, IMG_PAD = "<img>", "</img>", "<imgpad>"
CONTROL = (ENDOFTEXT, IM_START, IM_END, *(f"<|extra_{index}|>" for index in range(205)))
GROUNDING = (REF, REF_END, BOX, BOX_END, QUAD, QUAD_END)
IMAGE = (IMG, IMG_END, IMG_PAD)
SPECIALS = (*CONTROL, *GROUNDING, *IMAGE)  # their ids follow the ranks in this order
SPLIT = (  # tokenization_qwen.py: PAT_STR; digits are split one by one
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


_MARKS = regex.compile(r"\p{M}{1000}")  # NFC sorts a run of combining marks in time that grows with its square
_SPACES = regex.compile(r"\s{400000}")  # from about 600,000 on tiktoken's engine runs out of its stack


def _cut_after(pattern: "regex.Pattern[str]", text: str) -> Iterator[str]:
    """`text` in parts that end behind the matches."""
    start = 0
    for match in pattern.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def _normalize(text: str) -> str:
    """NFC; in more than 1,000 combining marks on end, of each thousand by itself."""
    if text.isascii():
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in _cut_after(_MARKS, text))


class Tokenizer:
    """Text <-> token ids.

    `ranks` maps byte strings to ids 0 … n-1 as qwen.tiktoken lists them; the special tokens follow from n on. The
    published file has 151,643 ranks, a small model ships the first few thousand. encoding: tiktoken's own object.
    """

    def __init__(self, ranks: dict[bytes, int]):
        self.specials = {token: len(ranks) + index for index, token in enumerate(SPECIALS)}
        self.encoding = tiktoken.Encoding("qwen_vl", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=self.specials)
        self._special_ids = frozenset(self.specials.values())
        self._longest = max(map(len, ranks))

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Read qwen.tiktoken (lines "BASE64 RANK"). CheckpointError names the line that cannot be read."""
        path = Path(path)
        lines = read_bytes(path, error=CheckpointError).splitlines()
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise CheckpointError(
                    f"{path} line {number} is {line[:40]!r}, expected a base64 token and its rank; copy the file again"
                ) from None
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise CheckpointError(
                f"{path} holds {len(ranks)} tokens whose ranks are not 0 … {len(ranks) - 1}; it is cut or damaged, "
                "copy it again"
            )
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:  # tiktoken ends the thread with one
            raise CheckpointError(
                f"{path} lacks {len(missing)} of the 256 single bytes, such as {missing[0]:#04x}; it is damaged, "
                "copy it again"
            )
        return cls(ranks)

    @classmethod
    def from_folder(cls, folder: Path, config: Config) -> "Tokenizer":
        """The tokenizer of the checkpoint or bundle at `folder`. ConfigError if its ids are not those of `config`."""
        file = folder / VOCAB_FILE
        tokenizer = cls.from_file(file)
        start = tokenizer.specials[IMG]
        if tokenizer.vocab_size > config.vocab_size or start != config.visual.image_start_id:
            raise ConfigError(
                f"{file} has {tokenizer.vocab_size} tokens with {IMG} at {start}, config.json has vocab_size "
                f"{config.vocab_size} and image_start_id {config.visual.image_start_id}; copy this model's {VOCAB_FILE}"
            )
        return tokenizer

    def most_characters(self, tokens: int) -> int:
        """No text with more characters has `tokens` tokens or fewer: none is longer, and NFC joins four at most."""
        return 4 * tokens * self._longest

    @property
    def vocab_size(self) -> int:
        """Ids in use: ranks and special tokens (151,860 in the published model, whose embedding has 151,936 rows)."""
        return self.encoding.n_vocab

    def encode(self, text: str, allowed_special: Collection[str] = GROUNDING) -> list[int]:
        """NFC-normalize and encode; special tokens not in `allowed_special` are plain text, never an error."""
        specials = set(allowed_special)
        ids: list[int] = []
        for part in _cut_after(_SPACES, _normalize(text)):
            ids += self.encoding.encode(part, allowed_special=specials, disallowed_special=())
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False, errors: str = "replace") -> str:
        """Token ids -> text; bytes that are no UTF-8 are handled as `errors` says.

        An image's slots are read as upstream fills them, bytes of the path up to the first <imgpad>: ours are empty, so
        a prompt shows <img></img>. Where upstream raises, an <img> left open or with other ids inside, it is like text.
        """
        return self.decode_bytes(self._with_paths(list(ids)), skip_special_tokens=skip_special_tokens).decode(
            "utf-8", errors=errors
        )

    def _with_paths(self, ids: list[int]) -> list[int]:
        """Replace each image's slots by the ids of the path that they spell."""
        start_id, end_id, pad_id = (self.specials[token] for token in IMAGE)
        plain: list[int] = []
        end = 0
        while True:
            try:
                start = ids.index(start_id, end)
                stop = ids.index(end_id, start)
            except ValueError:  # no further closed image
                return plain + ids[end:]
            slots = ids[start + 1 : stop]
            path = slots[: slots.index(pad_id)] if pad_id in slots else slots
            if all(byte < 256 for byte in path):
                slots = self.encode(bytes(path).decode("utf-8", errors="replace"), ())
            plain += [*ids[end : start + 1], *slots, end_id]
            end = stop + 1

    def decode_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> bytes:
        """Token ids -> bytes, for streaming. Ids past the vocabulary (padding rows of the embedding) give nothing."""
        limit = self.vocab_size
        kept = [i for i in ids if i < limit and not (skip_special_tokens and i in self._special_ids)]
        return self.encoding.decode_bytes(kept)


class TextStream:
    """Token ids -> text as it grows: `push` and `close` return what will not change any more.

    No character is split, and nothing is returned that a stop string takes back; once `stopped` is true the text has
    ended before one. Bytes that never become a character are shown as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = stop
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token id, return the new text."""
        return self._release(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def close(self) -> str:
        """Return what was held back, at the end of the answer."""
        rest = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = rest + ("" if self.stopped else self._held), ""
        return rest

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that could begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0)
