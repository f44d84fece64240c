"""List format <-> text, against the original tokenizer."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl_edge.errors import PromptError
from qvl_edge.text.list_format import from_list_format, to_list_format

GOLDEN = json.loads((Path(__file__).parent / "data" / "tokenizer.json").read_text(encoding="utf-8"))
GOOD = [case for case in GOLDEN["to_list_format"] if isinstance(case["list"], list)]
BAD = [case for case in GOLDEN["to_list_format"] if isinstance(case["list"], dict)]


@pytest.mark.parametrize("case", GOLDEN["from_list_format"], ids=lambda case: case["text"][:20])
def test_lists_become_the_originals_text(case: dict[str, Any]) -> None:
    assert from_list_format(case["list"]) == case["text"]


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case["text"][:20])
def test_text_becomes_the_originals_list(case: dict[str, Any]) -> None:
    assert to_list_format(case["text"]) == case["list"]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case["text"][:20])
def test_what_the_original_refuses_is_refused_as_a_value_error(case: dict[str, Any]) -> None:
    with pytest.raises(PromptError) as caught:
        to_list_format(case["text"])
    assert isinstance(caught.value, ValueError)


def test_both_kinds_of_golden_case_are_there() -> None:
    assert len(GOOD) == 6 and len(BAD) == 2


def points(count: int) -> st.SearchStrategy[str]:
    point = st.tuples(st.integers(0, 999), st.integers(0, 999)).map(lambda xy: f"({xy[0]},{xy[1]})")
    return st.lists(point, min_size=count, max_size=count).map(",".join)


# without marks and jamo: NFC joins them with the character before, which may be the end of a tag
WORDS = st.text(st.characters(exclude_categories=["Cs", "Mn", "Mc", "Me", "Lo"]) | st.sampled_from("世界狗"))
TAGS = ("<img>", "<ref>", "<box>", "<quad>")
TEXT = (WORDS | st.sampled_from(["a < b", "世界\n", " <|im_end|> </ref>"])).map(
    lambda text: unicodedata.normalize("NFC", text)
)
ELEMENTS = st.lists(
    TEXT.filter(lambda text: text and not any(tag in text for tag in TAGS)).map(lambda text: {"text": text})
    | TEXT.filter(lambda text: "</ref>" not in text).map(lambda text: {"ref": text})
    | points(2).map(lambda text: {"box": text})
    | points(4).map(lambda text: {"quad": text}),
    max_size=6,
)


@given(elements=ELEMENTS)
def test_lists_without_images_survive_the_way_to_text_and_back(elements: list[dict[str, str]]) -> None:
    expected: list[dict[str, str]] = []
    for element in elements:
        if "text" in element and expected and "text" in expected[-1]:  # neighbouring texts become one
            expected[-1] = {"text": expected[-1]["text"] + element["text"]}
        else:
            expected.append(element)
    joined = [element["text"] for element in expected if "text" in element]
    if not any(tag in text for text in joined for tag in TAGS):  # two texts can make one tag
        assert to_list_format(from_list_format(elements)) == expected


def test_the_picture_number_counts_images_only() -> None:
    elements = [{"text": "x"}, {"image": Path("a.jpg")}, {"ref": "r"}, {"image": "data:image/png;base64,AA=="}]
    assert from_list_format(elements) == (
        "xPicture 1:<img>a.jpg</img>\n<ref>r</ref>Picture 2:<img>data:image/png;base64,AA==</img>\n"
    )


@pytest.mark.parametrize(
    "box", [(1, 2, 3, 4), [[1, 2, 3, 4]], "(1,2),(3,4)", np.array([1, 2, 3, 4]), np.array([[1.9, 2, 3, 4]])]
)
def test_a_box_may_be_given_in_any_usual_form(box: Any) -> None:
    assert from_list_format([{"box": box}]) == "<box>(1,2),(3,4)</box>"


def test_a_quad_is_written_as_four_points() -> None:
    elements = [{"ref": "sign", "quad": (1, 2, 3, 4, 5, 6, 7, 8)}]
    assert from_list_format(elements) == "<ref>sign</ref><quad>(1,2),(3,4),(5,6),(7,8)</quad>"


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ({"video": "a.mp4"}, "video"),
        ({"image": "a.jpg", "text": "dropped"}, "image.*text"),
        ({}, "known are"),
        ("text", "known are"),
        ({"text": 5}, "'text'.*int"),
        ({"ref": None, "box": [1, 2, 3, 4]}, "'ref'.*NoneType"),
        ({"box": [1, 2, 3]}, "expected 4 numbers"),
        ({"box": "1,2"}, "expected 4 numbers"),
        ({"box": [[1, 2, 3, float("nan")]]}, "expected 4 numbers"),
        ({"box": None}, "expected 4 numbers"),
        ({"quad": [1, 2, 3, 4]}, "expected 8 numbers"),
        ({"image": b"\x89PNG"}, "bytes.*give the list itself"),
        ({"image": "a</img>b"}, "contains </img>"),
    ],
)
def test_an_element_that_cannot_be_written_is_refused_with_the_reason(element: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        from_list_format([element])


@pytest.mark.parametrize("text", ["<img>a.jpg", "a<box>(1,2),(3,4)", "<quad>", "<ref>x<ref>"])
def test_a_tag_left_open_is_named_with_its_place(text: str) -> None:
    with pytest.raises(
        PromptError, match=rf"{text[text.index('<') :][:5]}.* at character {text.index('<')} is left open"
    ):
        to_list_format(text)


@pytest.mark.parametrize("text", ["<quad>(1,2),(3,4)</quad>", "<box>(a,b),(c,d)</box>", "<box>(1,2),(3,4),(5,6)</box>"])
def test_a_box_without_its_points_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="points"):
        to_list_format(text)
