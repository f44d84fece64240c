"""IoU against counted pixels, and first boxes against what the Runtime reads."""

import numpy as np
import pytest

from qvl_edge.evaluate.grounding import MIN_IOU, first_box, grounding_iou, iou
from qvl_edge.text.boxes import parse_boxes

TOLERANCE = 1e-6  # a quotient of whole numbers


def boxes(count: int, side: int = 24) -> np.ndarray:
    """Random boxes (count, 4), int, corners in order, some without area."""
    points = np.random.default_rng(0).integers(0, side, (count, 2, 2))
    return np.sort(points, axis=1).reshape(count, 4)


def test_iou_is_that_of_counted_pixels():
    ys, xs = np.mgrid[:24, :24]
    for one, other in zip(boxes(300)[:150], boxes(300)[150:], strict=True):
        inside = [(xs >= x1) & (xs < x2) & (ys >= y1) & (ys < y2) for x1, y1, x2, y2 in (one, other)]
        union = (inside[0] | inside[1]).sum()
        counted = (inside[0] & inside[1]).sum() / union if union else 0.0
        assert iou(one, other) == pytest.approx(counted, abs=TOLERANCE)


def test_iou_is_symmetric_in_bounds_and_blind_to_scale_and_place():
    for one, other in zip(boxes(300)[:150], boxes(300)[150:], strict=True):
        value = iou(one, other)
        assert 0.0 <= value <= 1.0 and iou(other, one) == value
        assert iou(one * 2.5 + 7, other * 2.5 + 7) == pytest.approx(value, abs=TOLERANCE)
        area = (one[2] - one[0]) * (one[3] - one[1])
        assert iou(one, one) == float(area > 0)


def test_a_box_with_its_corners_exchanged_overlaps_nothing():
    assert iou((9, 9, 1, 1), (1, 1, 9, 9)) == iou((9, 1, 1, 9), (1, 1, 9, 9)) == 0.0


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("(1,2),(30,40)</box>", (1, 2, 30, 40)),
        ("<ref>a</ref><box>(1,2),(30,40)</box><box>(5,6),(7,8)</box>", (1, 2, 30, 40)),
        ("at ( 1 , 2.5 ),(-30,4e1)", (1, 2.5, -30, 40)),
        ("(1,2) (30,40)", None),
        ("(1,2),(30", None),
        ("(1,2,3),(30,40)", None),
        ("<ref>a (small) dog</ref><box>(1,2),(30,40)</box>", None),
        ("(a,b),(1,2) (1,2),(3,4)", None),  # the first pair decides, good or not
        ("no box", None),
    ],
)
def test_the_first_box_is_read_as_upstream_reads_it(text, box):
    assert first_box(text) == box


def test_the_runtime_reads_the_same_corners_from_well_formed_markup():
    for corners in boxes(100, 1000).tolist():
        x1, y1, x2, y2 = corners
        text = f"<ref>a small dog</ref><box>({x1},{y1}),({x2},{y2})</box> and <box>(1,1),(2,2)</box>"
        assert list(first_box(text)) == corners
        assert list(parse_boxes(text, image_sizes=[(640, 480)])[0].corners) == corners


def test_thousandths_are_of_a_picture_that_ends_at_999():
    assert grounding_iou("(0,0),(999,999)", (0, 0, 640, 480), width=640, height=480) == pytest.approx(
        1.0, abs=TOLERANCE
    )
    half = grounding_iou("(0,0),(999,999)", (0, 0, 320, 480), width=640, height=480)
    assert half == pytest.approx(MIN_IOU, abs=TOLERANCE)
    assert grounding_iou("nothing", (0, 0, 320, 480), width=640, height=480) == 0.0
