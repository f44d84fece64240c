"""Slots and their decode step: ended sequences, prompts that begin alike, and nothing that waits for the device."""

import dataclasses
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, SMALL
from torch import Tensor

from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.engine.engine import Engine
from qvl_edge.engine.graph import BUCKETS
from qvl_edge.engine.lookup import propose
from qvl_edge.engine.request import Request, common_prefix
from qvl_edge.engine.sampling import NOT_FINITE, Sampler, Samplers
from qvl_edge.engine.slots import Slots
from qvl_edge.errors import ConfigError, PromptError
from qvl_edge.model.cache import KVCache
from qvl_edge.model.decoder import QWenLMHeadModel
from qvl_edge.model.fused import FusedDecoder
from qvl_edge.model.loading import load_decoder
from qvl_edge.options import GenerationOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = GenerationOptions(do_sample=False)
SAMPLED = GenerationOptions(seed=7, temperature=1.3)


@pytest.fixture(scope="module")
def model() -> QWenLMHeadModel:
    return load_decoder(Checkpoint(GOLDEN / "tiny-a/checkpoint"), dtype=torch.float32)


@pytest.fixture(scope="module")
def long_model() -> QWenLMHeadModel:
    """Dynamic NTK and log-n begin at 128 positions."""
    return load_decoder(Checkpoint(GOLDEN / "tiny-long/checkpoint"), dtype=torch.float32)


def ids_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def placed(slots: Slots, ids: list[int], options: GenerationOptions = GREEDY, device: str = "cpu") -> Request:
    """A request in a slot, nothing of it prefilled."""
    request = Request.of_ids(ids, options, device=device)
    slots.begin(request)
    return request


def begun(slots: Slots, ids: list[int], options: GenerationOptions = GREEDY, chunk: int = 1000) -> Request:
    """A request whose prefill is done."""
    request = placed(slots, ids, options)
    while slots.prefill(request, chunk) is None:
        pass
    return request


def run(slots: Slots, ids: list[int], tokens: int, options: GenerationOptions = GREEDY) -> list[int]:
    """`tokens` tokens after a prompt."""
    request = Request.of_ids(ids, dataclasses.replace(options, max_new_tokens=tokens))
    return Engine(slots).complete(request).token_ids


def plain(model: QWenLMHeadModel, ids: list[int], tokens: int, options: GenerationOptions = GREEDY) -> list[int]:
    """The same by the plain loop of forward and choice, over a cache of its own."""
    samplers = Samplers(1, model.config.vocab_size)
    samplers.set(0, Sampler(options, ids))
    cache = KVCache(model.config, 1, len(ids) + tokens, dtype=model.dtype)
    embeds, found = model.embed(torch.tensor([ids])), []
    with torch.inference_mode():
        for _ in range(tokens):
            samplers.draw()
            found += samplers.choose(model(embeds, cache)).tolist()
            embeds = model.embed(torch.tensor([found[-1:]]))
    return found


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_steps_equal_the_plain_loop_of_forward_and_choice(model, options: GenerationOptions) -> None:
    assert run(Slots(model, capacity=24), ids_of(11), 9, options) == plain(model, ids_of(11), 9, options)


@pytest.mark.parametrize("chunk", [1, 7, 100, 128])
@pytest.mark.parametrize("length", [100, 129, 300])
def test_a_prompt_in_chunks_is_placed_by_its_whole_length(long_model, length: int, chunk: int) -> None:
    slots = Slots(long_model, capacity=320)
    sequence = begun(slots, ids_of(length), chunk=chunk)
    found = [sequence.last, *(slots.step()[sequence] for _ in range(5))]
    assert found == plain(long_model, ids_of(length), 6)


def test_sequences_join_and_leave_between_steps(model) -> None:
    lengths, limits = (9, 4, 13, 6), (12, 3, 5, 4)
    prompts = [ids_of(length, seed) for seed, length in enumerate(lengths)]
    alone = [plain(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    slots, waiting = Slots(model, capacity=40, count=2), list(enumerate(prompts))
    found: dict[int, list[int]] = {index: [] for index in range(len(prompts))}
    running: dict[Request, int] = {}
    while waiting or running:
        while waiting and slots.free:
            index, prompt = waiting.pop(0)
            sequence = begun(slots, prompt, chunk=5)
            running[sequence] = index
            found[index].append(sequence.last)
        for sequence, token in slots.step().items():
            found[running[sequence]].append(token)
        for sequence in [s for s, index in running.items() if len(found[index]) == limits[index]]:
            slots.end(sequence)
            del running[sequence]
    assert list(found.values()) == alone


def test_an_ended_sequence_stays_as_it_was_while_others_go_on(model) -> None:
    slots = Slots(model, capacity=20, count=2)
    first, second = begun(slots, ids_of(4)), begun(slots, ids_of(9, seed=1))
    slots.step()
    slots.end(first)
    before = slots.cache.k[:, 0, :, :5].clone()
    for _ in range(3):
        slots.step()
    assert torch.equal(slots.cache.k[:, 0, :, :5], before)
    assert slots.cache.filled.tolist() == [0, 13] and len(second.held) == 13
    again = placed(slots, [*ids_of(4), 5, 6])
    assert (again.slot, again.cached_tokens) == (0, 4)


def test_a_sequence_without_numbers_is_told_from_the_others(model) -> None:
    slots = Slots(model, capacity=20, count=2)
    bad, good = begun(slots, ids_of(3)), begun(slots, ids_of(5, seed=1))
    slots.cache.v[:, 0].fill_(torch.nan)
    tokens = slots.step()
    assert tokens[bad] == NOT_FINITE and tokens[good] >= 0


def test_a_request_whose_logits_are_no_numbers_ends_with_the_way_out(model) -> None:
    engine = Engine(Slots(model, capacity=20))
    request = Request.of_ids(ids_of(3), GREEDY)
    engine.add(request)
    engine.step()
    assert not request.done
    engine.slots.cache.v.fill_(torch.nan)
    engine.step()
    assert isinstance(request.error, ConfigError) and "not finite" in str(request.error)
    assert engine.slots.free == 1


def test_a_prompt_or_an_answer_that_does_not_fit_says_so(model) -> None:
    slots = Slots(model, capacity=8)
    with pytest.raises(PromptError, match="has 8 tokens and the cache holds 8 positions"):
        placed(slots, ids_of(8))
    begun(slots, ids_of(7))
    slots.step()
    with pytest.raises(PromptError, match="8 positions, which fill the cache of 8"):
        slots.step()


def test_a_failed_prefill_frees_nothing_that_is_not_there(model, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(model, capacity=40)
    expected = run(slots, ids_of(12), 4)
    inputs = [*ids_of(12), *ids_of(10, seed=3)]
    sequence = placed(slots, inputs)
    slots.prefill(sequence, 4)
    monkeypatch.setattr(QWenLMHeadModel, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        slots.prefill(sequence)
    slots.end(sequence)
    monkeypatch.undo()
    assert run(slots, inputs, 4) == plain(model, inputs, 4)
    assert run(slots, ids_of(12), 4) == expected


def test_the_slot_that_holds_the_prompts_beginning_is_taken(model) -> None:
    slots = Slots(model, capacity=40, count=3)
    for seed in range(3):
        run(slots, ids_of(8, seed), 3)
    longer = [*ids_of(8, seed=1), 7, 7]
    sequence = placed(slots, longer)
    assert (sequence.slot, sequence.cached_tokens) == (1, 8)
    slots.end(sequence)
    other = placed(slots, ids_of(8, seed=9))
    assert (other.slot, other.cached_tokens) == (0, 0)  # unused for longest
    slots.end(other)
    slots.forget()
    assert placed(slots, longer).cached_tokens == 0


@pytest.mark.parametrize("kv_cache", [torch.float32, torch.int8], ids=str)
def test_a_beginning_that_another_slot_holds_is_copied(model, kv_cache: torch.dtype) -> None:
    slots = Slots(model, capacity=60, count=3, kv_cache=kv_cache)
    base = ids_of(20)
    asked = [[*base, *ids_of(4, seed)] for seed in range(3)]
    alone = [run(Slots(model, capacity=60, kv_cache=kv_cache), inputs, 6) for inputs in asked]
    sequences = [begun(slots, inputs) for inputs in asked]
    assert [sequence.cached_tokens for sequence in sequences] == [0, 20, 20]
    found = [[sequence.last] for sequence in sequences]
    for _ in range(5):
        tokens = slots.step()
        for row, sequence in zip(found, sequences, strict=True):
            row.append(tokens[sequence])
    assert found == alone


def test_a_long_conversation_is_not_given_up_for_a_prompt_that_shares_its_system_turn(model) -> None:
    slots = Slots(model, capacity=60, count=2)
    system, talk = ids_of(6), ids_of(30, seed=1)
    run(slots, [*system, *talk], 2)
    other = begun(slots, [*system, *ids_of(5, seed=2)])
    assert (other.slot, other.cached_tokens) == (1, 6)
    slots.end(other)
    back = placed(slots, [*system, *talk, 3, 4])
    assert (back.slot, back.cached_tokens) == (0, 36)


def test_an_unloaded_cache_comes_back_empty(model) -> None:
    slots = Slots(model, capacity=40)
    expected = run(slots, ids_of(12), 4)
    slots.unload()
    assert slots._cache is None
    sequence = placed(slots, ids_of(12))
    assert sequence.cached_tokens == 0
    slots.end(sequence)
    assert run(slots, ids_of(12), 4) == expected


def test_pictures_are_told_apart_by_their_content() -> None:
    requests = [Request.of_ids([1, 0, 0, 0, 2, 3], GREEDY) for _ in range(4)]
    for request, key in zip(requests, ("a", "a", "b"), strict=False):
        request.set_features([1], [key], [torch.zeros(3, 8)])
    one, same, other, without = (request.elements for request in requests)
    assert common_prefix(one, same) == 6
    assert common_prefix(one, other) == common_prefix(one, without) == 1


@pytest.mark.slow
def test_reuse_gives_the_tokens_of_no_reuse_over_random_edits_and_across_the_ntk_border(long_model) -> None:
    rng = random.Random(0)
    slots, ids, seen = Slots(long_model, capacity=400), ids_of(60), set()
    for turn in range(40):
        found = run(slots, ids, 5)
        assert found == plain(long_model, ids, 5), f"turn {turn} with {len(ids)} tokens"
        sequence = placed(slots, [*ids, *found[:-1], 1])
        same_bucket = (len(ids) - 1) // 128 == (len(ids) + 4) // 128
        assert sequence.cached_tokens == (len(ids) + 4 if same_bucket else 0)
        seen.add(len(ids) > 128)
        slots.end(sequence)
        # the next turn, as a chat's; or an edit somewhere, or another beginning of the same text
        ids = [*ids, *found, *(rng.randrange(256) for _ in range(rng.randrange(1, 30)))]
        if rng.random() < 0.3:
            ids[rng.randrange(len(ids))] = rng.randrange(256)
        if len(ids) > 380 or rng.random() < 0.2:
            ids = ids[: rng.randrange(20, 200)]
    assert seen == {True, False}


def test_a_table_in_host_memory_gives_the_same_tokens(model, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = torch.device("cpu", 0)  # another name for the same place: the step then takes embeddings from the host
    monkeypatch.setattr(QWenLMHeadModel, "embeddings_device", elsewhere)
    slots = Slots(model, capacity=40, count=2)
    assert slots._embeds is not None
    assert [run(slots, ids_of(9, seed), 8) for seed in range(2)] == [
        plain(model, ids_of(9, seed), 8) for seed in range(2)
    ]


def on_meta(value: Any) -> Any:
    """A copy without memory, of tensors and of what holds them: asking it for a number is an error."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, list):
        return [on_meta(item) for item in value]
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return dataclasses.replace(value, **{field.name: on_meta(getattr(value, field.name)) for field in fields})
    return value


CHOICES = [
    GREEDY,
    GenerationOptions(seed=1),
    GenerationOptions(seed=1, top_p=0.5, top_k=9, repetition_penalty=1.1),
]


@pytest.mark.skipif(DEVICE == "cuda", reason="there CUDA itself is asked, below")
@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("options", CHOICES, ids=["greedy", "all", "cut"])
def test_a_step_asks_the_device_for_no_number_and_launches_five_kernels_a_layer(
    options: GenerationOptions, cache_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launched = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: launched.append(self.fn.__name__))
    layers = 3
    real = FusedDecoder.random(Config.from_dict({**SMALL, "num_hidden_layers": layers}), device="cpu")
    model = object.__new__(FusedDecoder)
    model.__dict__.update({name: on_meta(value) for name, value in vars(real).items() if name != "config"})
    model.config = real.config
    slots = Slots(real, capacity=4096, count=2, kv_cache=cache_dtype, graph=False)  # past seq_length: log-n is in it
    slots.cache.filled += 2100
    for slot in range(2):
        slots.samplers.set(slot, Sampler(options, [1]))
    slots.model = model
    for owner in (slots, slots.samplers, slots.cache):
        for name, value in vars(owner).items():
            if isinstance(value, Tensor) and name not in ("filled", "placed", "_host_tokens"):
                setattr(owner, name, on_meta(value))
    with torch.inference_mode():
        slots._step_leading(2, BUCKETS[-1], slots.samplers.kind())
    assert len(launched) == 5 * layers + 1  # rms_rows comes before the first
    assert slots.cache.filled.tolist() == [2101, 2101]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("options", [GREEDY, SAMPLED, GenerationOptions(seed=1, top_p=0.5)], ids=["greedy", "all", "p"])
def test_graphs_give_the_tokens_of_eager_steps_and_wait_for_nothing(options: GenerationOptions) -> None:
    model = FusedDecoder.random(Config.from_dict(SMALL), device=DEVICE)
    rows = []
    for graph in (False, True):
        slots = Slots(model, capacity=600, count=3, graph=graph)
        prompts = [ids_of(508, seed) for seed in range(2)]  # crosses a bucket; one slot stays free
        sequences = [placed(slots, prompt, options, device=DEVICE) for prompt in prompts]
        for sequence in sequences:
            slots.prefill(sequence)
        found = [sequences[0].last]
        for count in range(12):
            found.append(slots.step()[sequences[0]])
            if count == 5:
                slots.end(sequences[1])
        rows.append(found)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.inference_mode():
                slots._step_leading(3, 600, slots.samplers.kind())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_step_and_fused_decoder_need_torch_and_nothing_else(tmp_path: Path) -> None:
    blocked = ("tiktoken", "safetensors", "PIL", "onnxruntime", "numpy", "transformers", "onnx")
    lines = [f"import sys\nfor name in {blocked!r}: sys.modules[name] = None"]
    lines += [
        "import qvl_edge.model.fused, qvl_edge.engine.engine",
        "assert 'triton' not in sys.modules",
    ]
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_log_probabilities_are_those_of_the_models_own_distribution(model, options: GenerationOptions) -> None:
    slots, inputs = Slots(model, capacity=30, count=2), ids_of(9)
    sequence = begun(slots, inputs, dataclasses.replace(options, logprobs=3, temperature=2.0))
    other = begun(slots, ids_of(5, seed=1))
    found = [sequence.logprob]
    for _ in range(4):
        slots.step()
        found.append(sequence.logprob)
    assert other.logprob is None
    ids = [*inputs, *(item.token_id for item in found)]
    cache = KVCache(model.config, 1, 30, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(model.embed(torch.tensor([ids])), cache, all_logits=True)[0]
    chances = logits.double().log_softmax(-1)[len(inputs) - 1 : -1]
    for row, item in zip(chances, found, strict=True):
        best = row.topk(3)
        assert [token for token, _ in item.top] == best.indices.tolist()
        assert [value for _, value in item.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert item.logprob == pytest.approx(float(row[item.token_id]), abs=1e-4)


class Alternating:
    """Even tokens, then odd ones, in turn."""

    def __init__(self, vocab: int):
        self.vocab, self.taken = vocab, []

    def allowed(self) -> Tensor:
        return torch.arange(self.vocab) % 2 == len(self.taken) % 2

    def accept(self, token: int) -> None:
        self.taken.append(token)


def test_a_constraint_decides_what_may_come(model) -> None:
    slots, vocab = Slots(model, capacity=30, count=2), model.config.vocab_size
    free = begun(slots, ids_of(6, seed=1))
    constraint = Alternating(vocab)
    sequence = Request.of_ids(ids_of(6), SAMPLED, constraint=constraint)
    slots.begin(sequence)
    slots.prefill(sequence)
    tokens = [sequence.last, *(slots.step()[sequence] for _ in range(7))]
    assert constraint.taken == tokens and [token % 2 for token in tokens] == [0, 1] * 4
    expected = plain(model, ids_of(6, seed=1), 8)
    assert [*free.held[6:], free.last] == expected
    slots.end(sequence)
    assert run(slots, ids_of(6), 5) == plain(model, ids_of(6), 5)  # nothing of it is left


@pytest.mark.parametrize(
    ("elements", "most", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 3, [4, 9, 1]),
        ([1, 2, 3, 4, 9, 1, 2, 3], 1, [4]),
        ([5, 6, 7, 5, 6, 8, 5, 6], 2, [8, 5]),  # the latest
        ([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], 2, [7, 2]),  # the longest match before the latest
        ([1, 2, 3], 4, []),
        ([1, 1], 4, []),
        ([1, 2, "picture", "picture", 3, 1, 2], 4, []),
        ([1, 2, 4, "picture", 3, 1, 2], 4, [4]),
    ],
)
def test_a_guess_is_what_followed_the_latest_longest_match(elements: list, most: int, expected: list[int]) -> None:
    assert propose(elements, most) == expected


@pytest.mark.parametrize("lookup", [1, 3, 7])
@pytest.mark.slow
def test_guessing_changes_no_token(model, long_model, lookup: int) -> None:
    for kind, length in ((model, 30), (long_model, 120)):
        text = ids_of(length // 3)
        inputs = [*text, *text, *text]  # full of repetitions
        slots = Slots(kind, capacity=260, lookup=lookup)
        verified: list[int] = []
        real = slots._verify

        def watched(sequence: Request, guess: list[int], real: Any = real, verified: list[int] = verified) -> list[int]:
            found = real(sequence, guess)
            verified.append(len(found))
            return found

        slots._verify = watched  # type: ignore[method-assign]
        assert run(slots, inputs, 60) == plain(kind, inputs, 60)
        assert verified and max(verified) <= lookup + 1
        # what it holds is right too: the next turn reuses it
        again = [*inputs, *plain(kind, inputs, 20), 1]
        assert run(slots, again, 9) == plain(kind, again, 9)


def test_a_guess_keeps_within_the_cache(model) -> None:
    text = ids_of(10)
    inputs = [*text, *text]
    assert run(Slots(model, capacity=26, lookup=7), inputs, 6) == plain(model, inputs, 6)


def test_who_samples_or_is_not_alone_is_not_guessed_for(model, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ids_of(10)
    inputs = [*text, *text]
    monkeypatch.setattr(Slots, "_verify", None)
    slots = Slots(model, capacity=60, count=2, lookup=7)
    assert run(slots, inputs, 9, SAMPLED) == plain(model, inputs, 9, SAMPLED)
    begun(slots, inputs)
    begun(slots, inputs)
    assert all(len(tokens) == 1 for tokens in slots.advance().values())
