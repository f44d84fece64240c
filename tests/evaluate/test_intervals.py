"""Intervals cover the truth as often as they say, and agree with published worked examples."""

import math

import numpy as np
import pytest

from qvl_edge.evaluate.intervals import difference_of, mean_of

EXACT = 5e-4  # published figures have three or four digits
DRAWS = 2000
# a 95 % interval covers in 0.95 of the draws; four standard deviations of that share over DRAWS are 0.02, and the
# small samples here cost the approximations up to 0.02 more
COVERED = 0.91


def rights(right: int, n: int) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998), table I,
    # method 3: score without continuity correction
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_a_share_has_wilsons_interval(right: int, n: int, low: float, high: float) -> None:
    found = mean_of(rights(right, n))
    assert (found.low, found.high) == pytest.approx((low, high), abs=EXACT)
    assert found.value == right / n


def test_where_all_answers_are_right_the_interval_still_has_a_width() -> None:
    assert mean_of([1.0] * 100).low == pytest.approx(100 / (100 + 1.959964**2))
    same = difference_of([1.0] * 100, [1.0] * 100)
    assert same.mean.value == 0 and same.mean.low < -0.03 and same.mean.high > 0.03 and same.p == 1.0


def test_a_paired_difference_has_newcombes_interval() -> None:
    # Newcombe 1998 (paired), method 10 on 36 both, 12 first only, 2 second only, 0 neither; first minus second
    one, two = [1.0] * 48 + [0.0] * 2, [1.0] * 36 + [0.0] * 12 + [1.0] * 2
    found = difference_of(two, one).mean
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=EXACT)


def test_turned_around_a_paired_difference_changes_its_sign_only() -> None:
    rng = np.random.default_rng(2)
    one, two = (rng.random(50) < 0.7).astype(float), (rng.random(50) < 0.8).astype(float)
    there, back = difference_of(one, two), difference_of(two, one)
    assert (there.mean.value, there.mean.low, there.mean.high) == pytest.approx(
        (-back.mean.value, -back.mean.high, -back.mean.low)
    )
    assert (there.better, there.worse, there.p) == (back.worse, back.better, back.p)


def test_the_exact_p_value_is_the_binomial_tail() -> None:
    found = difference_of(rights(1, 10), [0.0] + [1.0] * 9)
    assert (found.better, found.worse) == (9, 1)
    assert found.p == pytest.approx(2 * (1 + 10) / 2**10)
    assert difference_of([0.0] * 4000, [1.0] * 4000).p == pytest.approx(0.0, abs=1e-300)


@pytest.mark.parametrize("weighted", [False, True])
def test_intervals_of_other_scores_cover_the_truth_as_often_as_they_say(weighted: bool) -> None:
    rng, n, covered = np.random.default_rng(0), 60, 0
    for _ in range(DRAWS):
        weights = rng.integers(5, 50, n).astype(float)
        values = rng.normal(2.0, 3.0, n) / (np.sqrt(weights) if weighted else 1.0)
        values = values + (2.0 - 2.0 / np.sqrt(weights) if weighted else 0.0)  # the mean is 2 whatever the weight
        found = mean_of(values, weights if weighted else ())
        covered += found.low <= 2.0 <= found.high
    assert covered / DRAWS > COVERED


def test_paired_intervals_of_shares_cover_the_truth_as_often_as_they_say() -> None:
    rng, n, covered = np.random.default_rng(1), 80, 0
    for _ in range(DRAWS):
        one = (rng.random(n) < 0.9).astype(float)
        two = np.where(rng.random(n) < 0.1, rng.random(n) < 0.5, one).astype(float)
        truth = 0.9 * 0.9 + 0.1 * 0.5 - 0.9
        found = difference_of(one, two).mean
        covered += found.low <= truth <= found.high
    assert covered / DRAWS > COVERED


def test_no_data_is_no_number_and_unequal_lengths_are_an_error() -> None:
    assert math.isnan(mean_of([]).value)
    with pytest.raises(ValueError, match="3 values and 2"):
        difference_of([1.0, 2.0, 3.0], [1.0, 2.0])
