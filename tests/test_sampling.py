"""Sampling: the distributions are the ones that the options describe."""

from collections import Counter

import pytest
import torch

from qvl_edge.engine.sampling import NOT_FINITE, Sampler, Samplers, check_tokens
from qvl_edge.errors import ConfigError
from qvl_edge.options import GenerationOptions

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -5.0])
DRAWS = 4000
TOLERANCE = 0.03  # four standard deviations of a share over DRAWS draws, sqrt(0.25 / 4000) = 0.008


def choose(samplers: Samplers, *logits: torch.Tensor) -> list[int]:
    """One choice of every sequence."""
    samplers.draw()
    return samplers.choose(torch.stack(logits)).tolist()


def alone(options: GenerationOptions, vocab: int, prompt_ids: tuple[int, ...] = ()) -> Samplers:
    return together(vocab, Sampler(options, prompt_ids))


def together(vocab: int, *sequences: Sampler) -> Samplers:
    samplers = Samplers(len(sequences), vocab)
    for slot, sampler in enumerate(sequences):
        samplers.set(slot, sampler)
    return samplers


def shares(**options) -> list[float]:
    samplers = alone(GenerationOptions(seed=1, **options), len(LOGITS))
    counts = Counter(choose(samplers, LOGITS)[0] for _ in range(DRAWS))
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
        # a token's share of the likeliest one's probability: 1, 0.368, 0.135, …
        ({"min_p": 0.3}, [2.0, 1.0, NONE, NONE, NONE]),
        ({"min_p": 0.3, "temperature": 2.0}, [1.0, 0.5, 0.0, NONE, NONE]),
        ({"min_p": 1.0}, [2.0, NONE, NONE, NONE, NONE]),
        ({"logit_bias": {"1": 1, "4": 7.0, "0": -100}}, [NONE, 2.0, 0.0, -1.0, 2.0]),
    ],
)
@pytest.mark.slow
def test_draws_follow_the_described_distribution(options: dict, logits: list[float]) -> None:
    for found, wanted in zip(shares(**options), expected(logits), strict=True):
        assert abs(found - wanted) < TOLERANCE
        assert wanted > 0 or found == 0


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    flat = torch.zeros(1000)

    def draw(seed: int | None) -> list[int]:
        samplers = alone(GenerationOptions(seed=seed), len(flat))
        return [choose(samplers, flat)[0] for _ in range(8)]

    assert draw(5) == draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_a_sequence_draws_the_same_alone_and_in_a_batch() -> None:
    options = [
        GenerationOptions(seed=3, temperature=1.5),
        GenerationOptions(do_sample=False, repetition_penalty=1.3),
        GenerationOptions(seed=4, top_k=20, top_p=0.9, repetition_penalty=1.2),
        GenerationOptions(seed=5, min_p=0.1, presence_penalty=0.4, frequency_penalty=0.3, logit_bias={3: 2.5}),
    ]
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(12, len(options), 50, generator=generator)
    batch = together(50, *(Sampler(option, [1, 2]) for option in options))
    rows = [choose(batch, *logits) for logits in steps]
    for index, option in enumerate(options):
        single = alone(option, 50, (1, 2))
        assert [choose(single, logits[index])[0] for logits in steps] == [tokens[index] for tokens in rows]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    logits = torch.tensor([1.0, 0.9, -0.1, -0.15])
    greedy = GenerationOptions(do_sample=False, repetition_penalty=2.0)
    samplers = alone(greedy, 4, (0,))
    assert choose(samplers, logits) == [1]  # 1.0 / 2 < 0.9
    assert choose(samplers, logits) == [0]  # 0.9 / 2 < 1.0 / 2
    assert choose(alone(greedy, 2, (0,)), torch.tensor([-0.1, -0.15])) == [1]  # -0.1 * 2 < -0.15
    assert logits.tolist() == pytest.approx([1.0, 0.9, -0.1, -0.15])


@pytest.mark.parametrize("prompt", [(), (0, 0, 1)])
def test_presence_and_frequency_penalties_count_tokens_of_the_answer_only(prompt: tuple[int, ...]) -> None:
    logits = torch.tensor([1.0, 0.7, 0.0, -0.05])
    once = alone(GenerationOptions(do_sample=False, presence_penalty=0.5), 4, prompt)
    assert [choose(once, logits)[0] for _ in range(4)] == [0, 1, 0, 0]  # 1.0, 0.7; then 0.5 and 0.2 for good
    each = alone(GenerationOptions(do_sample=False, frequency_penalty=0.5), 4, prompt)
    # 1.0, 0.7, 0.5, 0.2, then 0.0 (twice taken) against 0.0 of token 2, the first of equals
    assert [choose(each, logits)[0] for _ in range(7)] == [0, 1, 0, 1, 0, 2, 3]
    more = alone(GenerationOptions(do_sample=False, presence_penalty=-2, frequency_penalty=0.9), 4, prompt)
    assert [choose(more, logits)[0] for _ in range(4)] == [0, 0, 0, 1]


def test_a_slot_forgets_the_penalties_and_biases_of_the_request_before() -> None:
    logits = torch.tensor([1.0, 0.9])
    samplers = alone(GenerationOptions(do_sample=False, frequency_penalty=2.0, logit_bias={1: -50}), 2)
    assert [choose(samplers, logits)[0] for _ in range(2)] == [0, 0]
    for options in (GenerationOptions(do_sample=False), GenerationOptions(do_sample=False, frequency_penalty=0.05)):
        samplers.set(0, Sampler(options, []))
        assert choose(samplers, logits) == [0]


@pytest.mark.parametrize(
    "options", [{"presence_penalty": 1}, {"frequency_penalty": 1}, {"logit_bias": {1: 1}}, {"repetition_penalty": 2}]
)
def test_what_changes_logits_is_not_plainly_greedy(options: dict) -> None:
    # prompt lookup would skip it
    assert not Sampler(GenerationOptions(do_sample=False, **options), []).is_greedy


@pytest.mark.parametrize("sampled", [False, True])
def test_logits_that_are_no_numbers_are_told_apart_and_lead_to_a_way_out(sampled: bool) -> None:
    samplers = together(3, *(Sampler(GenerationOptions(do_sample=sampled, seed=0), []) for _ in range(2)))
    tokens = choose(samplers, torch.tensor([0.0, 9.0, 0.0]), torch.tensor([0.0, float("nan"), 1.0]))
    assert tokens[1] == NOT_FINITE and tokens[0] >= 0
    with pytest.raises(
        ConfigError, match="sequence 1 are not finite in float16: .*too large.*use bfloat16; or its weights"
    ):
        check_tokens(tokens, torch.float16)
    with pytest.raises(ConfigError, match="sequence 1 are not finite in float32: its weights hold NaN"):
        check_tokens(tokens, torch.float32)


def test_a_draw_stays_when_logits_are_rounded_otherwise() -> None:
    # float16 logits of a large vocabulary are full of ties, and a batch rounds some to their neighbours: a token's
    # noise must not depend on how many stand before it
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(20_000, generator=generator)).half()
    neighbours = torch.where(torch.rand(len(logits), generator=generator) < 0.01, logits * (1 + 2**-10), logits)
    for options in (GenerationOptions(seed=1), GenerationOptions(seed=1, top_p=0.9, top_k=15_000)):
        drawn = [alone(options, len(logits)) for _ in range(2)]
        tokens = [(choose(drawn[0], logits.float()), choose(drawn[1], neighbours.float())) for _ in range(DRAWS // 100)]
        assert sum(one == other for one, other in tokens) >= len(tokens) - 1


def test_a_sequence_draws_the_same_where_another_one_cuts() -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0))
    single, pair = (
        together(30, Sampler(GenerationOptions(seed=3), []), Sampler(GenerationOptions(seed=4, **cut), []))
        for cut in ({}, {"top_k": 3})
    )
    for _ in range(50):
        assert choose(single, logits, logits)[0] == choose(pair, logits, logits)[0]


def test_tokens_as_likely_as_the_last_of_top_k_stay_as_in_transformers() -> None:
    samplers = alone(GenerationOptions(seed=1, top_k=2), 4)
    logits = torch.tensor([3.0, 2.0, 2.0, 1.0])
    assert {choose(samplers, logits)[0] for _ in range(200)} == {0, 1, 2}
