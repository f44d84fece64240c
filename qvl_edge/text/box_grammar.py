"""Answers whose boxes are well formed, token by token: text, then <ref>label</ref><box>(x1,y1),(x2,y2)</box>, …

Coordinates are 0 to 999, as Qwen-VL was trained. Text between boxes is free; a <ref> has a label and at least one box.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from qvl_edge.text.tokenizer import BOX, BOX_END, GROUNDING, IMAGE, QUAD, QUAD_END, REF, REF_END, Tokenizer

_N = r"(?:0|[1-9]\d{0,2})"
_WHOLE = re.compile(rf"\({_N},{_N}\),\({_N},{_N}\)")
_CHARACTERS = frozenset(b"0123456789(),")
_EXAMPLE = "(0,0),(0,0)"  # by its parts, whether something can still become a whole one


def _can_go_on(text: str) -> bool:
    """Whether `text` is the beginning of (x1,y1),(x2,y2), or all of it."""
    if _WHOLE.fullmatch(text):
        return True
    # the parts that are complete, replaced by 0, have to begin the example
    shape = re.sub(rf"(?<![\d]){_N}(?![\d])", "0", text)
    return _EXAMPLE.startswith(shape)


class BoxTables:
    """Which tokens a box's text can be made of, and masks that are the same everywhere; one for each tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, stop_ids: frozenset[int]):
        special = tokenizer.specials
        self.tokenizer, self.vocab = tokenizer, vocab
        ordinary = torch.zeros(vocab, dtype=torch.bool)
        ordinary[: min(special.values())] = True
        self.ids = {name: special[name] for name in GROUNDING}
        self.text = ordinary.clone()  # outside of labels and boxes
        self.text[[special[REF], special[BOX], *stop_ids]] = True
        self.text[[special[name] for name in (*IMAGE, QUAD, QUAD_END, REF_END, BOX_END)]] = False
        self.label = ordinary
        self.label_or_end = ordinary.clone()
        self.label_or_end[special[REF_END]] = True
        self._inside: dict[str, Tensor] = {}

    @cached_property
    def candidates(self) -> list[tuple[int, str]]:
        """Tokens made of nothing but digits, brackets and commas."""
        found = ((token, self.tokenizer.decode_bytes([token])) for token in range(min(self.ids.values())))
        return [(token, text.decode()) for token, text in found if text and _CHARACTERS.issuperset(text)]

    def only(self, name: str) -> Tensor:
        """Nothing but one special token."""
        mask = torch.zeros(self.vocab, dtype=torch.bool)
        mask[self.ids[name]] = True
        return mask

    def inside(self, text: str) -> Tensor:
        """What may follow `text` inside a box."""
        state = re.sub(r"\d+(?=\D)", "0", text)  # numbers that are complete make no difference
        if state not in self._inside:
            mask = self.only(BOX_END) if _WHOLE.fullmatch(text) else torch.zeros(self.vocab, dtype=torch.bool)
            mask[[token for token, more in self.candidates if _can_go_on(text + more)]] = True
            self._inside[state] = mask
        return self._inside[state]


@dataclass
class BoxGrammar:
    """The constraint of one answer."""

    tables: BoxTables
    place: str = (
        "text"  # "text", "label" (before its first token), "labelled" (after it), "named" (after </ref>), "box"
    )
    box: str = field(default="")  # what stands in the box so far

    def allowed(self) -> Tensor:
        """(vocab,) bool."""
        tables = self.tables
        if self.place == "box":
            return tables.inside(self.box)
        masks = {"text": tables.text, "label": tables.label, "labelled": tables.label_or_end}
        return tables.only(BOX) if self.place == "named" else masks[self.place]

    def accept(self, token: int) -> None:
        """Go on after `token`."""
        ids = self.tables.ids
        if self.place == "box":
            if token == ids[BOX_END]:
                self.place, self.box = "text", ""
            else:
                self.box += self.tables.tokenizer.decode_bytes([token]).decode()
        elif token == ids[BOX]:
            self.place = "box"
        elif token == ids[REF]:
            self.place = "label"
        elif token == ids[REF_END]:
            self.place = "named"
        elif self.place == "label":
            self.place = "labelled"
