"""Boxes: parsed as the original does, malformed ones skipped, drawn so that labels can be read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from qvl_edge.text.boxes import Box, parse_boxes
from qvl_edge.text.draw import PALETTE, draw_boxes
from qvl_edge.text.font import SHIPPED, find_font, missing_glyphs, split_runs

GOLDEN = json.loads((Path(__file__).parent / "data" / "tokenizer.json").read_text(encoding="utf-8"))
SIZE = (640, 480)
SIDE = st.integers(1, 5000)
SPAN = st.tuples(st.integers(0, 1000), st.integers(0, 1000)).map(sorted)
POINTS = st.tuples(*[st.tuples(st.integers(0, 1000), st.integers(0, 1000))] * 4)


def parse(text: str) -> list[Box]:
    return parse_boxes(text, image_sizes=[SIZE])


@pytest.mark.parametrize("case", GOLDEN["boxes"], ids=lambda case: case["text"][:20])
def test_boxes_and_labels_are_the_originals_and_its_errors_are_skipped(case: dict[str, Any]) -> None:
    expected = case["boxes"] if isinstance(case["boxes"], list) else []
    found = parse(case["text"])
    assert [list(box.corners) for box in found] == [box["box"] for box in expected]
    assert [box.label for box in found] == [box.get("ref") for box in expected]


@given(width=SIDE, height=SIDE, across=SPAN, down=SPAN)
def test_pixels_are_thousandths_of_the_original_picture_cut_to_whole_numbers(
    width: int, height: int, across: list[int], down: list[int]
) -> None:
    (x1, x2), (y1, y2) = across, down
    (box,) = parse_boxes(f"<box>({x1},{y1}),({x2},{y2})</box>", image_sizes=[(width, height)])
    expected = (int(x1 / 1000 * width), int(y1 / 1000 * height), int(x2 / 1000 * width), int(y2 / 1000 * height))
    assert box.pixels == expected


PLAIN = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]))
PIECES = st.tuples(st.just("text"), PLAIN) | st.tuples(st.just("box"), SPAN, SPAN) | st.tuples(st.just("quad"), POINTS)


@given(pieces=st.lists(st.tuples(PIECES, st.none() | PLAIN), max_size=8))
def test_boxes_that_are_written_between_any_text_are_read_back(pieces: list[Any]) -> None:
    text, expected, labels = "", [], []
    for (kind, *content), label in pieces:
        text += "." if label is None else f".<ref>{label}</ref>"  # the full stop ends what a label before it holds for
        if kind == "text":
            text += content[0]
            continue
        if kind == "box":
            (x1, x2), (y1, y2) = content
            corners: Any = ((x1, y1), (x2, y2))
        else:
            (corners,) = content
        text += f"<{kind}>" + ",".join(f"({x},{y})" for x, y in corners) + f"</{kind}>"
        expected.append(corners)
        labels.append((label or "").strip() or None)
    found = parse(text)
    assert [box.quad or (box.corners[:2], box.corners[2:]) for box in found] == expected
    assert [box.label for box in found] == labels


def test_a_label_holds_for_all_boxes_directly_after_it() -> None:
    box = "<box>(1,2),(3,4)</box>"
    labels = [found.label for found in parse(f"<ref>a</ref>{box}{box} {box}<ref>b</ref><quad>bad</quad>{box}")]
    assert labels == ["a", "a", None, "b"]


GOOD = "<ref>dog</ref><box>(10,20),(30,40)</box>"


@pytest.mark.parametrize(
    "bad",
    [
        "<box>(1,2)</box>",
        "<box>(1,2),(3,4),(5,6)</box>",
        "<box>(1,2),(3,4,5)</box>",
        "<box>(a,b),(c,d)</box>",
        "<box>(-1,2),(3,4)</box>",
        "<box>(1.5,2),(3,4)</box>",
        "<box>(30,2),(3,4)</box>",
        "<box>(1,20),(3,4)</box>",
        "<box>(1,2),(3,1001)</box>",
        "<box>(1,2),(3,99999999999999999999)</box>",
        "<box></box>",
        "<box>(1,2),(3,4)",
        "(1,2),(3,4)</box>",
        "<box>(1,2),(3,4)</quad>",
        "<ref>left open",
        "</ref>",
        "<ref>",
        "<quad>(1,2),(3,4)</quad>",
        "<quad>(1,2),(3,4),(5,6),(7,x)</quad>",
    ],
)
def test_a_malformed_piece_is_skipped_and_takes_nothing_along(bad: str) -> None:
    for text in (bad + GOOD, GOOD + bad, GOOD + bad + GOOD):
        assert parse(text) == parse(GOOD) * text.count(GOOD)


def test_a_label_left_open_before_a_box_is_no_label() -> None:
    assert [(box.label, box.corners) for box in parse("<ref>open<box>(1,2),(3,4)</box>")] == [(None, (1, 2, 3, 4))]


MARKUP = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "(1,2)", ",", "(999,1000)", "狗", "<", "7", "(1,2),(3,4)"]
MARKUP += ["<box>(1,2),(999,1000)", "(1,2),(5,3),(4,5),(6,1000)</quad>"]


def test_random_pieces_of_markup_never_raise_and_always_give_boxes_within_the_picture() -> None:
    seen = 0

    @settings(max_examples=1000)
    @given(text=st.lists(st.sampled_from(MARKUP), max_size=14).map("".join))
    def check(text: str) -> None:
        nonlocal seen
        for box in parse(text):
            seen += 1
            left, top, right, bottom = box.pixels
            assert 0 <= left <= right <= SIZE[0] and 0 <= top <= bottom <= SIZE[1]

    check()
    assert seen > 50


def test_long_malformed_text_is_read_in_a_moment() -> None:
    # quadratic reading of these would take minutes; the test would not end
    for piece in ("<ref>", "<box>", "<ref>a</ref>", "<box>(1,2),(3,4)", "<quad>(", "</box>"):
        assert parse(piece * 100_000) == []
    assert parse("<box>" + " " * 200_000 + "(1,2)" + " " * 200_000 + "</box>") == []


def test_boxes_belong_to_the_latest_picture() -> None:
    (latest,) = parse_boxes(GOOD, image_sizes=[(100, 100), (200, 400)])
    assert (latest.image, latest.pixels) == (1, (2, 8, 6, 16))
    assert parse_boxes(GOOD, image_sizes=[]) == []


def test_a_quad_has_its_points_and_the_rectangle_around_them() -> None:
    (box,) = parse("<ref>sign</ref><quad>(500,100),(700,150),(680,300),(480,240)</quad>")
    assert box.quad == ((500, 100), (700, 150), (680, 300), (480, 240))
    assert box.quad_pixels == ((320, 48), (448, 72), (435, 144), (307, 115))
    assert (box.label, box.corners, box.pixels) == ("sign", (480, 100, 700, 300), (307, 48, 448, 144))


def test_a_box_is_plain_json() -> None:
    box, quad = parse(GOOD + "<quad>(0,0),(1,0),(1,1),(0,1)</quad>")
    assert json.loads(json.dumps(box.to_dict())) == {
        "label": "dog",
        "corners": [10, 20, 30, 40],
        "pixels": [6, 9, 19, 19],
        "image": 0,
    }
    assert quad.to_dict()["quad"] == [[0, 0], [1, 0], [1, 1], [0, 1]]


# Drawing


def drawn(text: str, size: tuple[int, int] = SIZE, background: tuple[int, int, int] = (100, 100, 100)) -> np.ndarray:
    image = Image.new("RGB", size, background)
    return np.asarray(draw_boxes(image, parse_boxes(text, image_sizes=[size])))


def holds(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (pixels == np.array(colour)).all(-1)


def test_lines_lie_on_the_edges_of_the_box_and_nothing_is_drawn_elsewhere() -> None:
    pixels = drawn("<box>(250,250),(750,750)</box>")
    coloured = holds(pixels, PALETTE[0])
    assert coloured[120, 200:440].all() and coloured[360, 200:440].all()  # 250 and 750 thousandths of 480
    assert coloured[140:340, 160].all() and coloured[140:340, 480].all()
    untouched = holds(pixels, (100, 100, 100))
    assert untouched[130:350, 170:470].all() and untouched[:110].all() and untouched[:, 490:].all()


def test_the_given_picture_stays_as_it_was_and_the_new_one_is_rgb() -> None:
    for mode in ("RGB", "L", "RGBA", "P"):
        image = Image.new(mode, SIZE)
        before = image.tobytes()
        result = draw_boxes(image, parse(GOOD))
        assert (result.mode, result.size, image.tobytes()) == ("RGB", SIZE, before)
        assert result.tobytes() != image.convert("RGB").tobytes()


def test_one_label_has_one_colour_and_two_labels_have_two() -> None:
    text = "<ref>a</ref><box>(50,200),(250,400)</box><ref>b</ref><box>(400,200),(600,400)</box>"
    same = drawn(text.replace("<ref>b", "<ref>a"))
    both = drawn(text)
    assert holds(both, PALETTE[0])[:, 250:].sum() == 0 and holds(both, PALETTE[1])[:, 250:].sum() > 500
    assert holds(same, PALETTE[0])[:, 250:].sum() > 500 and holds(same, PALETTE[1]).sum() == 0


@pytest.mark.parametrize("size", [(80, 60), (320, 240), (2000, 300), (1500, 2000)])
@pytest.mark.parametrize("corners", ["(0,0),(60,40)", "(940,0),(1000,50)", "(0,960),(30,1000)", "(960,960),(999,999)"])
def test_a_label_stays_within_the_picture_at_every_corner(size: tuple[int, int], corners: str) -> None:
    text = f"<ref>狗</ref><box>{corners}</box>"
    # drawn again in the middle of a frame, the plate must have the same amount of colour: nothing was cut off
    pixels = drawn(text, size)
    middle = drawn("<ref>狗</ref><box>(400,400),(460,440)</box>", size)
    plate = holds(middle, PALETTE[0]).sum()
    assert holds(pixels, PALETTE[0]).sum() > 0.6 * plate


def test_labels_of_equal_boxes_do_not_cover_one_another() -> None:
    text = "".join(f"<ref>物体{index}</ref><box>(300,300),(600,600)</box>" for index in range(8))
    pixels = drawn(text)
    amounts = [holds(pixels, colour).sum() for colour in PALETTE[:7]]  # the lines are all in the last one's colour
    assert min(amounts) > 0.8 * max(amounts)


def test_a_label_longer_than_the_picture_is_cut_with_an_ellipsis() -> None:
    pixels = drawn("<ref>" + "很长的标签" * 60 + "</ref><box>(400,400),(600,600)</box>", (200, 150))
    assert pixels.shape == (150, 200, 3)
    across = holds(pixels, PALETTE[0]).any(0)  # cut to the width of the picture, to a hanzi
    assert 200 - 12 < across.sum() <= 200


def test_lines_and_letters_grow_with_the_picture() -> None:
    shares = []
    for scale in (1, 4):
        pixels = drawn("<ref>狗 dog</ref><box>(300,300),(700,700)</box>", (400 * scale, 300 * scale))
        shares.append(holds(pixels, PALETTE[0]).mean())
    assert shares[1] == pytest.approx(shares[0], rel=0.25)  # of the picture's area, rounding to pixels aside


@pytest.mark.parametrize("label", ["\n\t", "\x00\u200b", "", "a\nb", "👩‍👩‍👧", "العربية"])
@pytest.mark.parametrize("corners", ["(5,5),(5,5)", "(0,0),(1000,1000)", "(1000,1000),(1000,1000)"])
def test_odd_labels_and_empty_boxes_draw_without_an_error(label: str, corners: str) -> None:
    for size in ((1, 1), (3, 200), (64, 64)):
        assert drawn(f"<ref>{label}</ref><box>{corners}</box>", size).shape == (size[1], size[0], 3)


def test_the_shipped_font_writes_every_hanzi_of_gb2312_and_latin_text() -> None:
    rows = range(0xB0, 0xF8)
    hanzi = "".join(bytes((row, cell)).decode("gb2312", "ignore") for row in rows for cell in range(0xA1, 0xFF))
    assert len(hanzi) == 6763
    latin = "".join(map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]))
    assert missing_glyphs(SHIPPED, hanzi + latin + "，。！？“”‘’《》、…—ＡＢＣ１２３") == set()


def test_a_glyph_that_a_font_lacks_is_noticed() -> None:
    assert missing_glyphs(SHIPPED, "狗 x \u0e01한") == {"\u0e01", "한"}


def test_two_hanzi_look_different_and_neither_is_the_box_of_a_missing_glyph() -> None:
    font = find_font(24)
    shapes = {bytes(font.getmask(character)) for character in "狗猫\U0010ffff"}
    assert len(shapes) == 3


def test_a_label_beyond_the_shipped_font_takes_a_font_of_the_machine(tmp_path: Path) -> None:
    # Pillow carries a small Latin font that has the ligature ﬁ, which the shipped one lacks
    other = tmp_path / "below" / "other.ttf"
    other.parent.mkdir()
    other.write_bytes(ImageFont.load_default(20).font_bytes)
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    folders = (str(tmp_path), str(tmp_path / "missing"))
    assert missing_glyphs(SHIPPED, "ﬁsh 狗") == {"ﬁ"}
    assert find_font(20, "ﬁsh", folders).path == other
    assert find_font(20, "狗 fish", folders).path == SHIPPED
    # no font has all of this, so it is cut where only the other one helps
    runs = [(text, font.path) for text, font in split_runs("狗ﬁsh\u0e01", 20, folders)]
    assert runs == [("狗", SHIPPED), ("ﬁ", other), ("sh\u0e01", SHIPPED)]
