"""Synthetic scenes: the answers are what the pixels show."""

import numpy as np
import pytest

from qvl_edge.demo.scenes import CELL, COLOURS, DIGITS, DOT, KINDS, SIZE, ask, ask_which, make_scene

SEEDS = range(40)


def test_a_seed_is_a_scene_and_another_seed_another() -> None:
    assert make_scene(5).image.tobytes() == make_scene(5).image.tobytes() != make_scene(6).image.tobytes()


@pytest.mark.parametrize("seed", SEEDS)
def test_every_shape_lies_in_its_box_in_its_colour(seed: int) -> None:
    scene = make_scene(seed)
    pixels = np.asarray(scene.image).astype(int)
    assert 1 <= len(scene.shapes) <= 4
    for shape in scene.shapes:
        near = (np.abs(pixels - COLOURS[shape.colour][0]) <= 6).all(axis=2)  # noise is ±5
        left, top, right, bottom = (round(edge * SIZE / 1000) for edge in shape.box)
        rows, columns = np.nonzero(near[top:bottom, left:right])
        # its outermost pixels touch the sides of the box
        assert (rows.min(), columns.min()) <= (2, 2)
        assert rows.max() >= bottom - top - 3 and columns.max() >= right - left - 3
        centre = pixels[(top + bottom) // 2, (left + right) // 2]
        assert np.abs(centre - COLOURS[shape.colour][0]).max() <= 6


@pytest.mark.parametrize("seed", SEEDS)
def test_the_printed_number_can_be_read_back_from_its_dots(seed: int) -> None:
    scene = make_scene(seed)
    if scene.number is None:
        return
    pixels = np.asarray(scene.image.convert("L"))
    read = ""
    for index in range(len(scene.number)):
        left, top = (scene.number_cell[0] + index) * CELL + 4, scene.number_cell[1] * CELL
        dots = pixels[top + DOT // 2 : top + 7 * DOT : DOT, left + DOT // 2 : left + 5 * DOT : DOT] < 128
        read += str(DIGITS.index(" ".join("".join("1" if dot else "0" for dot in row) for row in dots)))
    assert read == scene.number


def test_things_do_not_overlap_and_no_two_are_alike() -> None:
    for seed in SEEDS:
        shapes = make_scene(seed).shapes
        assert len({(shape.colour, shape.kind) for shape in shapes}) == len(shapes)
        for i, a in enumerate(shapes):
            for b in shapes[i + 1 :]:
                (l1, t1, r1, b1), (l2, t2, r2, b2) = a.cells, b.cells
                assert r1 < l2 or r2 < l1 or b1 < t2 or b2 < t1


@pytest.mark.parametrize("language", ["en", "zh"])
def test_questions_of_every_kind_have_their_exact_answer(language: str) -> None:
    rng, seen = np.random.default_rng(0), set()
    for seed in SEEDS:
        scene = make_scene(seed)
        for kind in KINDS[:-1]:
            question = ask(scene, kind, language, rng)
            if question is None:
                assert kind in ("colour", "read")
                continue
            seen.add(kind)
            if kind == "count":
                assert question.answer.startswith(str(len(scene.shapes)))
            elif kind == "read":
                assert question.answer == scene.number
            elif kind == "describe":
                assert question.answer.count("<box>") == len(scene.shapes)
            else:
                assert question.target in scene.shapes
                word = COLOURS[question.target.colour][1] if language == "zh" else question.target.colour
                assert word in question.answer.lower()
    assert seen == set(KINDS[:-1])


def test_the_two_picture_question_names_the_one_that_shows_it() -> None:
    rng = np.random.default_rng(0)
    for seed in SEEDS:
        scenes = make_scene(seed), make_scene(seed + 1000)
        question = ask_which(scenes, "en", rng)
        if question is None:
            continue
        name = (question.target.colour, question.target.kind)
        shows = [name in {(s.colour, s.kind) for s in scene.shapes} for scene in scenes]
        assert shows.index(True) + 1 == int(question.answer[-1]) and sum(shows) == 1
    assert ask_which((make_scene(1), make_scene(1)), "en", rng) is None


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'sing', a question about one scene"):
        ask(make_scene(0), "sing", "en", np.random.default_rng(0))
