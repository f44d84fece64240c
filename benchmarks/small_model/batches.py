"""Scenes turned into training batches for the small model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qvl_edge.config import IMAGE_TOKENS
from qvl_edge.demo.scenes import COLOURS, GRID, KINDS, SHAPES, Question, Scene, ask, ask_which, make_scene
from qvl_edge.published import SYSTEM
from qvl_edge.text.prompt import chat_prompt
from qvl_edge.text.tokenizer import IM_END, IM_START, Tokenizer

IGNORE = -100  # label of a token that is not part of an answer (torch's default ignore_index)
COORDINATES = GRID + 1  # grid lines a box edge can lie on
# of find, at, count, colour, read, describe; read was 0.3 until numbers were learned
SHARES = (0.45, 0.10, 0.12, 0.13, 0.05, 0.15)
CHINESE = 0.7  # share of questions: at half, all wrong shapes were in Chinese, which takes a token per byte
TWO_TURNS = 0.25  # share of branches that ask a second question after the first answer


@dataclass
class CellTargets:
    """Class indices (B, 256) of what each grid cell of B pictures shows; 0: nothing."""

    colour: Tensor
    shape: Tensor
    digit: Tensor
    place: Tensor  # 1 on the first digit of a number, 2 on the second, …
    centre: Tensor  # 1 on the middle cell of a shape, so that shapes can be counted
    edges: Tensor  # (B, 256, 4): grid lines of the shape's box

    @property
    def subject(self) -> Tensor:
        """What a question calls a cell: the colour of its shape, or one more class for all digits."""
        return torch.where(self.digit > 0, len(COLOURS) + 1, self.colour)


def cell_targets(scenes: list[Scene]) -> CellTargets:
    """Dense targets for the vision tower."""
    colours, kinds = list(COLOURS), list(SHAPES)
    planes = np.zeros((5, len(scenes), GRID, GRID), dtype=np.int64)
    edges = np.zeros((len(scenes), GRID, GRID, 4), dtype=np.int64)
    for index, scene in enumerate(scenes):
        for shape in scene.shapes:
            left, top, right, bottom = shape.cells
            planes[0, index, top:bottom, left:right] = colours.index(shape.colour) + 1
            planes[1, index, top:bottom, left:right] = kinds.index(shape.kind) + 1
            planes[4, index, (top + bottom) // 2, (left + right) // 2] = 1
            edges[index, top:bottom, left:right] = shape.cells
        for offset, digit in enumerate(scene.number or ""):
            row, column = scene.number_cell[1], scene.number_cell[0] + offset
            planes[2:4, index, row, column] = int(digit) + 1, offset + 1
    colour, shape, digit, place, centre = torch.from_numpy(planes).flatten(2)
    return CellTargets(colour, shape, digit, place, centre, torch.from_numpy(edges).flatten(1, 2))


@dataclass
class Batch:
    """B packed sequences: a prefix (system turn and pictures), and question branches that attend only to it.

    ids, labels, positions and weights (B, L); attention (B, 1, L, L) is 0 where a token is seen and -inf elsewhere.
    A label weighs 1 / sqrt(tokens of its answer), so that long boxes do not outweigh one-word answers. image_starts
    are the positions of each picture's 256 features, the same in every sequence.
    """

    scenes: list[Scene]  # pictures of sequence 0, then of sequence 1, …
    ids: Tensor
    labels: Tensor
    weights: Tensor
    positions: Tensor
    attention: Tensor
    image_starts: list[int]


@dataclass
class Branch:
    """The tokens of some turns."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


class BatchBuilder:
    """Makes batches from seeds."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        special = tokenizer.specials
        self.start, self.end = special[IM_START], special[IM_END]
        # (target of CellTargets, last tokens of the names of its classes)
        self.words = [
            (target, torch.tensor([tokenizer.encode(word)[-1] for word in words]))
            for target, words in (
                ("subject", [*(f" {colour}" for colour in COLOURS), " number"]),
                ("colour", [chinese for _, chinese in COLOURS.values()]),
                ("shape", [f" {shape}" for shape in SHAPES]),
                ("shape", [chinese[0] for chinese in SHAPES.values()]),
                ("digit", list("0123456789")),
            )
        ]

    def prefix(self, pictures: int) -> tuple[list[int], list[int]]:
        """Token ids up to the last picture, and the start of each picture's features."""
        query = [*[{"image": ""}] * pictures, {"text": ""}]
        prompt = chat_prompt(self.tokenizer, query, [], SYSTEM, max_window_size=6144, markup_images=False)
        return prompt.ids[: prompt.image_starts[-1] + IMAGE_TOKENS + 1], prompt.image_starts

    def branch(self, questions: list[Question]) -> Branch:
        """Question turns and their answers, from the newline after the picture on."""
        encode = self.tokenizer.encode
        branch = Branch()
        for index, question in enumerate(questions):
            turn = (
                [*encode("\n"), self.start, *encode("user\n" + question.text)]
                if index
                else encode("\n" + question.text)
            )
            ask = [*turn, self.end, *encode("\n"), self.start, *encode("assistant\n")]
            answer = [*encode(question.answer), self.end]
            branch.ids += ask + answer
            branch.labels += [IGNORE] * len(ask) + answer
            branch.weights += [0.0] * len(ask) + [len(answer) ** -0.5] * len(answer)
        return branch

    def build(self, seed: int, *, size: int, budget: int, pictures: int = 1) -> Batch:
        """The batch of this seed: `size` sequences, each with at most `budget` tokens of questions."""
        scenes, rows = list[Scene](), list[list[Branch]]()
        for index in range(size):
            rng = np.random.default_rng((seed, index))
            row_scenes = tuple(make_scene(int(rng.integers(10**9))) for _ in range(pictures))
            scenes += row_scenes
            rows.append(self._branches(row_scenes, rng, budget))
        return self._pack(scenes, rows, pictures)

    def _branches(self, scenes: tuple[Scene, ...], rng: np.random.Generator, budget: int) -> list[Branch]:
        branches, used, asked = list[Branch](), 0, set[str]()
        for _ in range(64):
            questions = []
            for _ in range(2 if rng.random() < TWO_TURNS else 1):
                language = "zh" if rng.random() < CHINESE else "en"
                if len(scenes) == 2:
                    question = ask_which((scenes[0], scenes[1]), language, rng)
                else:
                    kind = str(rng.choice(KINDS[:-1], p=SHARES))
                    question = ask(scenes[0], kind, language, rng)
                if question is not None and question.text not in asked:
                    asked.add(question.text)
                    questions.append(question)
            if not questions:
                continue
            branch = self.branch(questions)
            if used + len(branch.ids) > budget:
                break
            branches.append(branch)
            used += len(branch.ids)
        return branches

    def _pack(self, scenes: list[Scene], rows: list[list[Branch]], pictures: int) -> Batch:
        prefix, starts = self.prefix(pictures)
        length = len(prefix)
        shared = Branch(prefix, [IGNORE] * length, [0.0] * length)
        sequences = [[shared, *row] for row in rows]

        def packed(values: Callable[[int, Branch], Sequence[float]], padding: float) -> Tensor:
            joined = [[value for part in enumerate(sequence) for value in values(*part)] for sequence in sequences]
            return pad_sequence([torch.tensor(row) for row in joined], batch_first=True, padding_value=padding)

        ids = packed(lambda _, part: part.ids, self.end)
        labels = packed(lambda _, part: part.labels, IGNORE)
        weights = packed(lambda _, part: part.weights, 0.0)
        owner = packed(lambda number, part: [number] * len(part.ids), -1)  # 0: the prefix
        positions = packed(lambda _, part: range(len(part.ids)), 0) + length * (owner > 0)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        seen = causal & ((owner == 0)[:, None] | (owner[:, None] == owner[:, :, None]))
        attention = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None]
        return Batch(scenes, ids, labels, weights, positions, attention, starts)
