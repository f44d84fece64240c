"""Sampling: the distributions are the ones that the options describe."""

from collections import Counter

import pytest
import torch

from qvl_edge.engine.options import GenerationOptions
from qvl_edge.engine.sampling import Sampler
from qvl_edge.errors import ConfigError

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])
DRAWS = 4000
TOLERANCE = 0.03  # four standard deviations of a share over DRAWS draws, sqrt(0.25 / 4000) = 0.008


def shares(**options) -> list[float]:
    sampler = Sampler(GenerationOptions(seed=1, **options), [])
    counts = Counter(sampler.choose(LOGITS) for _ in range(DRAWS))
    return [counts[token] / DRAWS for token in range(len(LOGITS))]


def expected(logits: list[float]) -> list[float]:
    return torch.tensor(logits, dtype=torch.float64).softmax(-1).tolist()


NONE = float("-inf")


@pytest.mark.parametrize(
    ("options", "logits"),
    [
        ({}, LOGITS.tolist()),
        ({"temperature": 2.0}, (LOGITS / 2).tolist()),
        ({"top_k": 2}, [2.0, 1.0, NONE, NONE, NONE]),
        # probabilities 0.643, 0.237, 0.087, …: the first two reach 0.8
        ({"top_p": 0.8}, [2.0, 1.0, NONE, NONE, NONE]),
        ({"top_p": 0.1}, [2.0, NONE, NONE, NONE, NONE]),
        # top_p works on what top_k left: 0.731, 0.269 of the first two
        ({"top_k": 2, "top_p": 0.7}, [2.0, NONE, NONE, NONE, NONE]),
    ],
)
def test_draws_follow_the_described_distribution(options: dict, logits: list[float]) -> None:
    for found, wanted in zip(shares(**options), expected(logits), strict=True):
        assert abs(found - wanted) < TOLERANCE
        assert wanted > 0 or found == 0


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    flat = torch.zeros(1000)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(GenerationOptions(seed=seed), [])
        return [sampler.choose(flat) for _ in range(8)]

    assert draw(5) == draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    logits = torch.tensor([1.0, 0.9, -0.1, -0.15])
    greedy = GenerationOptions(do_sample=False, repetition_penalty=2.0)
    sampler = Sampler(greedy, [0])
    assert sampler.choose(logits) == 1  # 1.0 / 2 < 0.9
    assert sampler.choose(logits) == 0  # 0.9 / 2 < 1.0 / 2
    negative = torch.tensor([-0.1, -0.15])
    assert Sampler(greedy, [0]).choose(negative) == 1  # -0.1 * 2 < -0.15
    assert logits.tolist() == pytest.approx([1.0, 0.9, -0.1, -0.15])


@pytest.mark.parametrize(
    "bad", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"max_new_tokens": 0}, {"stop": [""]}]
)
def test_an_impossible_option_is_refused_by_name(bad: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        GenerationOptions().with_overrides(bad)


def test_a_misspelt_option_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown generation option 'temprature'.*temperature"):
        GenerationOptions().with_overrides({"temprature": 1.0})


def test_published_generation_configs_are_read_and_foreign_keys_passed_over() -> None:
    options = GenerationOptions.from_config(
        {"chat_format": "chatml", "top_k": 0, "top_p": 0.3, "max_new_tokens": 512, "do_sample": True, "eos_token_id": 1}
    )
    assert (options.top_p, options.max_new_tokens, options.do_sample) == (0.3, 512, True)
    assert GenerationOptions.from_config({"temperature": 0}).do_sample is False
