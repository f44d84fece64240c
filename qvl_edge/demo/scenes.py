"""Synthetic scenes with exact answers: the small model is trained on them, the demo and the tests ask about them.

A scene is a 448-pixel picture of one to four shapes, no two of one kind or colour, and in every second scene a printed
number. Shapes and digits are aligned with the 28-pixel grid of the small model's patches, which lets 7 million
parameters learn them on two CPU cores. The seed determines everything, on any machine: digits are drawn from a bitmap.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIZE = 448  # pixels per side, the model's input size
CELL = 28  # pixels per side of a grid cell, the small model's patch
GRID = SIZE // CELL
COLOURS = {
    "red": ((220, 40, 40), "红"),
    "green": ((40, 170, 60), "绿"),
    "blue": ((50, 80, 220), "蓝"),
    "yellow": ((240, 210, 40), "黄"),
    "purple": ((150, 60, 190), "紫"),
    "orange": ((245, 140, 30), "橙"),
    "black": ((20, 20, 20), "黑"),
    "white": ((245, 245, 245), "白"),
}
SHAPES = {"circle": "圆形", "square": "方块", "triangle": "三角形", "diamond": "菱形"}
KINDS = ("find", "at", "count", "colour", "read", "describe", "which")
UNSEEN = 10**9  # scenes from this seed on are never trained on

# 5 x 7 dots per digit: seven rows of five bits
DIGITS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
MAX_DIGITS = 3
DOT = 4  # pixels: a digit is 20 x 28


@dataclass(frozen=True)
class Shape:
    """One coloured shape; its box is in grid cells, right and bottom edge excluded."""

    colour: str
    kind: str
    cells: tuple[int, int, int, int]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Corners on the model's scale of 0 to 999."""
        x1, y1, x2, y2 = (min(cell * 1000 // GRID, 999) for cell in self.cells)
        return x1, y1, x2, y2

    def name(self, language: str) -> str:
        """'red circle' or '红色圆形'."""
        return f"{self.colour} {self.kind}" if language == "en" else f"{COLOURS[self.colour][1]}色{SHAPES[self.kind]}"


@dataclass(frozen=True)
class Scene:
    """A picture and its contents; `number` is None if none is printed, `number_cell` is the cell of its first digit."""

    image: Image.Image
    shapes: tuple[Shape, ...]  # from left to right
    number: str | None
    number_cell: tuple[int, int]


@dataclass(frozen=True)
class Question:
    """A question about one scene, or two for kind "which", and its exact answer."""

    kind: str
    language: str
    text: str
    answer: str
    target: Shape | None = None  # the shape in question, if there is one


def make_scene(seed: int) -> Scene:
    """The scene of `seed`."""
    rng = np.random.default_rng(seed)
    free = np.ones((GRID + 2, GRID + 2), dtype=bool)  # one cell of margin around

    def place(width: int, height: int) -> tuple[int, int] | None:
        """Take a free rectangle with a free cell around it; None if 40 tries find none."""
        for _ in range(40):
            x, y = int(rng.integers(0, GRID - width + 1)), int(rng.integers(0, GRID - height + 1))
            if free[y : y + height + 2, x : x + width + 2].all():
                free[y + 1 : y + height + 1, x + 1 : x + width + 1] = False
                return x, y
        return None

    number, number_cell = None, (0, 0)
    if rng.random() < 0.5:
        number = str(rng.integers(10, 10**MAX_DIGITS))
        number_cell = place(len(number), 1) or (0, 0)
    shapes = []
    colours = rng.permutation(list(COLOURS))[: len(SHAPES)]
    pairs = list(zip(colours, rng.permutation(list(SHAPES)), strict=True))
    for colour, kind in pairs[: int(rng.integers(1, len(SHAPES) + 1))]:
        size = int(rng.integers(3, 6))
        if (cell := place(size, size)) is not None:
            shapes.append(Shape(str(colour), str(kind), (*cell, cell[0] + size, cell[1] + size)))
    shapes.sort(key=lambda shape: shape.cells)
    background = tuple(int(level) for level in rng.integers(90, 190, 3))
    image = _draw(background, shapes, number, number_cell)
    noise = rng.integers(-5, 6, (SIZE, SIZE, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
    return Scene(Image.fromarray(pixels), tuple(shapes), number, number_cell)


def _draw(
    background: tuple[int, ...], shapes: list[Shape], number: str | None, number_cell: tuple[int, int]
) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), background)
    draw = ImageDraw.Draw(image)
    for shape in shapes:
        left, top, right, bottom = (cell * CELL for cell in shape.cells)
        right, bottom = right - 1, bottom - 1  # ImageDraw includes the last pixel
        across, down = (left + right) / 2, (top + bottom) / 2
        fill = COLOURS[shape.colour][0]
        if shape.kind == "circle":
            draw.ellipse((left, top, right, bottom), fill=fill)
        elif shape.kind == "square":
            draw.rectangle((left, top, right, bottom), fill=fill)
        elif shape.kind == "triangle":
            draw.polygon(((across, top), (left, bottom), (right, bottom)), fill=fill)
        else:
            draw.polygon(((across, top), (right, down), (across, bottom), (left, down)), fill=fill)
    if number is not None:
        left, top = number_cell[0] * CELL, number_cell[1] * CELL
        draw.rectangle((left - 6, top - 6, left + len(number) * CELL + 5, top + CELL + 5), fill=(255, 255, 255))
        for index, digit in enumerate(number):
            for row, bits in enumerate(DIGITS[int(digit)].split()):
                for column, bit in enumerate(bits):
                    if bit == "1":
                        x, y = left + index * CELL + 4 + column * DOT, top + row * DOT
                        draw.rectangle((x, y, x + DOT - 1, y + DOT - 1), fill=(10, 10, 10))
    return image


def box_markup(box: tuple[int, int, int, int]) -> str:
    """<box>(x1,y1),(x2,y2)</box>."""
    return "<box>({},{}),({},{})</box>".format(*box)


def ask(scene: Scene, kind: str, language: str, rng: np.random.Generator) -> Question | None:
    """A question of `kind` in "en" or "zh" about `scene`; None if the scene has nothing to ask about."""
    english = language == "en"
    target = scene.shapes[int(rng.integers(len(scene.shapes)))]
    name = target.name(language)
    if kind == "find":
        text = f"Find the {name}." if english else f"框出{name}。"
        answer = f"<ref>{name}</ref>{box_markup(target.box)}"
    elif kind == "at":
        markup = box_markup(target.box)
        text = f"What is at {markup}?" if english else f"{markup}里是什么？"
        answer = f"A {name}." if english else f"{name}。"
    elif kind == "count":
        text = "How many shapes are there?" if english else "有几个图形？"
        answer = f"{len(scene.shapes)}" if english else f"{len(scene.shapes)}个"
    elif kind == "colour":
        if sum(shape.kind == target.kind for shape in scene.shapes) > 1:
            return None
        text = f"What colour is the {target.kind}?" if english else f"{SHAPES[target.kind]}是什么颜色？"
        answer = f"{target.colour.capitalize()}." if english else f"{COLOURS[target.colour][1]}色。"
    elif kind == "read":
        if scene.number is None:
            return None
        text = "What number is printed?" if english else "印着什么数字？"
        answer = scene.number
    elif kind == "describe":
        text = "Describe the picture with boxes." if english else "描述这张图并框出图形。"
        parts = [f"<ref>{shape.name(language)}</ref>{box_markup(shape.box)}" for shape in scene.shapes]
        answer = (", " if english else "，").join(parts)
        if scene.number is not None:
            answer += f", number {scene.number}" if english else f"，数字{scene.number}"
    else:
        raise ValueError(f"kind is {kind!r}, a question about one scene has one of {KINDS[:-1]}")
    return Question(kind, language, text, answer, target if kind in ("find", "at", "colour") else None)


def ask_any(scene: Scene, rng: np.random.Generator) -> Question:
    """A question of a random kind and language that `scene` has something to ask about; colours are left out."""
    while True:
        kind = str(rng.choice(["find", "count", "read", "describe", "at"]))
        if (question := ask(scene, kind, str(rng.choice(["en", "zh"])), rng)) is not None:
            return question


def ask_which(scenes: tuple[Scene, Scene], language: str, rng: np.random.Generator) -> Question | None:
    """Which of two pictures shows a shape; None if no shape is on only one of them."""
    names = [{(shape.colour, shape.kind) for shape in scene.shapes} for scene in scenes]
    choices = [
        (index, shape)
        for index, scene in enumerate(scenes)
        for shape in scene.shapes
        if (shape.colour, shape.kind) not in names[1 - index]
    ]
    if not choices:
        return None
    index, target = choices[int(rng.integers(len(choices)))]
    name = target.name(language)
    text = f"Which picture shows the {name}?" if language == "en" else f"哪张图里有{name}？"
    return Question("which", language, text, f"Picture {index + 1}" if language == "en" else f"图{index + 1}", target)


def write_conversations(folder: Path, first_seed: int, count: int) -> Path:
    """Scenes with several questions each, in Qwen-VL's fine-tuning format: PNG files, and the path of a .json."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for seed in range(first_seed, first_seed + count):
        scene = make_scene(seed)
        name = f"scene-{seed}.png"
        scene.image.save(folder / name)
        entries.append({"id": f"scene-{seed}", "conversations": _turns(scene, name, np.random.default_rng(seed))})
    path = folder / "conversations.json"
    path.write_text(json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def _turns(scene: Scene, image: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for kind in rng.permutation(KINDS[:-1]):
        question = ask(scene, str(kind), ("en", "zh")[int(rng.integers(2))], rng)
        if question is not None:
            text = question.text if turns else f"Picture 1:<img>{image}</img>\n{question.text}"
            turns += [{"from": "user", "value": text}, {"from": "assistant", "value": question.answer}]
    return turns
