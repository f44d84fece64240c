"""The decode step: ended sequences, one cache after another, and nothing that waits for the device."""

import dataclasses
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
from qvl_edge.engine.generate import generate
from qvl_edge.engine.graph import BUCKETS, DecodeStep, Decoding
from qvl_edge.engine.options import GenerationOptions
from qvl_edge.engine.sampling import NOT_FINITE, Sampler, Samplers
from qvl_edge.errors import ConfigError
from qvl_edge.model.cache import KVCache
from qvl_edge.model.decoder import QWenLMHeadModel
from qvl_edge.model.fused import FusedDecoder
from qvl_edge.model.loading import load_decoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = GenerationOptions(do_sample=False)
SAMPLED = GenerationOptions(seed=7, temperature=1.3)


@pytest.fixture(scope="module")
def model() -> QWenLMHeadModel:
    return load_decoder(Checkpoint(GOLDEN / "tiny-a/checkpoint"), dtype=torch.float32)


def prompts_of(model: QWenLMHeadModel, *counts: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [model.embed(torch.randint(0, 256, (1, count), generator=generator)) for count in counts]


def step_of(model: QWenLMHeadModel, prompts: list[Tensor], capacity: int, options: GenerationOptions) -> DecodeStep:
    cache = KVCache(model.config, len(prompts), capacity, dtype=model.dtype)
    samplers = Samplers([Sampler(options, []) for _ in prompts], model.config.vocab_size)
    step = DecodeStep(model, cache, samplers, graph=False)
    with torch.inference_mode():
        step.first(torch.cat([model(prompt, cache.sequence(b)) for b, prompt in enumerate(prompts)]))
    return step


def test_an_ended_sequence_keeps_its_length_and_writes_nowhere_else(model) -> None:
    prompts = prompts_of(model, 4, 9)
    step = step_of(model, prompts, 20, GREEDY)
    step.next([False, False])
    before = step.cache.k[:, 0].clone()
    for _ in range(3):
        step.next([True, False])
    assert step.cache.lengths.tolist() == step.cache.filled.tolist() == [5, 13]
    changed = (step.cache.k[:, 0] != before).any(-1).any(0).any(0)  # by position
    assert changed.nonzero().flatten().tolist() in ([], [4], [5])


def test_an_ended_sequence_without_numbers_does_not_stop_the_others(model) -> None:
    step = step_of(model, prompts_of(model, 3, 5), 20, GREEDY)
    step.next([False, False])
    step.tokens[0] = NOT_FINITE
    assert min(step.next([True, False])) >= 0
    assert min(step.next([True, False])) >= 0


def test_a_step_never_chooses_rotary_frequencies_again(model, monkeypatch: pytest.MonkeyPatch) -> None:
    # a graph would write them at every replay; a prompt of one token that ends at once looks like an empty sequence
    step = step_of(model, prompts_of(model, 1, 3), 20, GREEDY)
    monkeypatch.setattr("qvl_edge.model.decoder.rotary_frequencies", None)
    step.next([True, False])
    assert step.cache.filled.tolist() == [1, 4]


def test_a_running_sequence_without_numbers_is_an_error(model) -> None:
    step = step_of(model, prompts_of(model, 3), 20, GREEDY)
    step.cache.v.fill_(torch.nan)
    with pytest.raises(ConfigError, match="not finite"):
        step.next([False])


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_steps_equal_the_plain_loop_of_forward_and_choice(model, options: GenerationOptions) -> None:
    prompt = prompts_of(model, 11)
    step = step_of(model, prompt, 24, options)
    found = [step.tokens.tolist()[0], *(step.next([False])[0] for _ in range(8))]
    samplers = Samplers([Sampler(options, [])], model.config.vocab_size)
    cache, embeds, expected = KVCache(model.config, 1, 24, dtype=model.dtype), prompt[0], []
    with torch.inference_mode():
        for _ in found:
            samplers.draw()
            expected += samplers.choose(model(embeds, cache)).tolist()
            embeds = model.embed(torch.tensor([expected[-1:]]))
    assert found == expected


def test_a_cache_is_kept_for_the_next_batch_that_fits(model) -> None:
    decoding = Decoding(model)
    decoding.graph = True  # so that it keeps its steps; none runs here
    step = step_of(model, prompts_of(model, 5), 32, GREEDY)
    decoding.give_back(step)
    again = decoding.take([Sampler(GREEDY, [])], 30)
    assert again is step
    assert again.cache.filled.tolist() == again.cache.lengths.tolist() == [0]
    assert decoding._idle is None  # whoever comes meanwhile gets a cache of its own


def test_streams_that_take_turns_do_not_disturb_each_other(model) -> None:
    decoding, prompts = Decoding(model), prompts_of(model, 6, 6)

    def run(prompt: Tensor):
        return generate(
            decoding, [prompt], [Sampler(GREEDY, [])], stop_ids=frozenset(), max_new_tokens=[6], capacity=12
        )

    alone = [[tokens[0] for tokens in run(prompt)] for prompt in prompts]
    turns = [(one[0], other[0]) for one, other in zip(run(prompts[0]), run(prompts[1]), strict=True)]
    assert [list(tokens) for tokens in zip(*turns, strict=True)] == alone


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
    cache = KVCache(model.config, 2, 4096, dtype=cache_dtype, device="meta")  # past seq_length: log-n is in it
    cache.advance(2100)
    samplers = Samplers([Sampler(options, [1])] * 2, model.config.vocab_size)
    for name, value in vars(samplers).items():
        setattr(samplers, name, on_meta(value) if isinstance(value, Tensor) else value)
    DecodeStep(model, cache, samplers, graph=False)._step(BUCKETS[-1])
    assert len(launched) == 5 * layers + 1  # rms_rows comes before the first
    assert cache.filled.tolist() == [2101, 2101]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
@pytest.mark.parametrize("options", [GREEDY, SAMPLED, GenerationOptions(seed=1, top_p=0.5)], ids=["greedy", "all", "p"])
def test_graphs_give_the_tokens_of_eager_steps_and_wait_for_nothing(options: GenerationOptions) -> None:
    model = FusedDecoder.random(Config.from_dict(SMALL), device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for graph in (False, True):
        cache = KVCache(model.config, 2, 600, dtype=torch.float16, device=DEVICE)
        samplers = Samplers([Sampler(options, [], device=DEVICE)] * 2, model.config.vocab_size, device=DEVICE)
        step = DecodeStep(model, cache, samplers, graph=graph)
        ids = torch.randint(0, 256, (2, 508), generator=generator.manual_seed(0)).to(DEVICE)  # crosses a bucket
        with torch.inference_mode():
            first = step.first(model(model.embed(ids), cache))
        rows.append([first, *(step.next([False, count > 5]) for count in range(12))])
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.inference_mode():
                step._step(1024)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [tokens[0] for tokens in rows[0]] == [tokens[0] for tokens in rows[1]]


def test_step_and_fused_decoder_need_torch_and_nothing_else(tmp_path: Path) -> None:
    blocked = ("tiktoken", "safetensors", "PIL", "onnxruntime", "numpy", "transformers", "onnx")
    lines = [f"import sys\nfor name in {blocked!r}: sys.modules[name] = None"]
    lines += [
        "import qvl_edge.model.fused, qvl_edge.engine.graph, qvl_edge.engine.generate",
        "assert 'triton' not in sys.modules",
    ]
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
