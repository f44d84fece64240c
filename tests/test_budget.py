"""The budget: its parts are those that a loaded model has, profiles are chosen by it, and too much is refused early."""

import json
import random
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, write_small_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import Int4Weight, pack_for_cpu, pack_for_triton, pack_zeros, quantize_int8
from quantize.job import quantize_checkpoint
from qvl_edge import Runtime
from qvl_edge.__main__ import main
from qvl_edge.bundle import FORMAT_VERSION, MANIFEST
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config, QuantConfig
from qvl_edge.demo import SMALL_MODEL
from qvl_edge.engine import budget as budgets
from qvl_edge.engine.budget import Plan, choose, does_not_fit, estimate, longest_context, remedies
from qvl_edge.errors import ConfigError, FitError
from qvl_edge.memory import Memory, parse_bytes
from qvl_edge.model.cache import KVCache
from qvl_edge.model.fused import fuse_block
from qvl_edge.model.linear import Int4Linear
from qvl_edge.model.loading import load_decoder, projections
from qvl_edge.options import PROFILES
from qvl_edge.published import NAMES, published_config

CPU = Plan("cpu", torch.float32, "float32", "float16", "float16")
CARD = Plan("cuda", torch.float16, "float16", "float16", "float16")
INT4 = published_config("Qwen/Qwen-VL-Chat-Int4")
assert INT4 is not None
GB = 10**9


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("budget")
    source = Checkpoint(write_small_checkpoint(folder / "checkpoint"))
    quantize_checkpoint(source, folder / "bundle", QuantConfig(group_size=64), None)
    return Checkpoint(folder / "bundle")


@pytest.mark.parametrize("head", ["float16", "int8"])
def test_the_layers_and_the_head_of_a_loaded_model_take_what_was_estimated(quantized: Checkpoint, head: Any) -> None:
    model = load_decoder(quantized, dtype=torch.float32, head=head)
    found = estimate(quantized.config, replace(CPU, head=head))
    int4 = [m for m in model.modules() if isinstance(m, Int4Linear)]
    layers = sum(m.weight.nbytes for m in int4 if m.weight is not None)
    layers += sum(m.bias.nbytes for m in int4 if m.bias is not None)
    layers += sum(p.nbytes for name, p in model.named_parameters() if "ln_" in name)
    assert found.layers == layers
    assert found.head == model.lm_head.weight.nbytes


@pytest.mark.parametrize(("outputs", "inputs"), [(4096, 1024), (300, 128)])
def test_a_weight_on_a_card_takes_what_was_estimated(outputs: int, inputs: int) -> None:
    words = torch.zeros(inputs // 8, outputs, dtype=torch.int32)
    scales = torch.ones(inputs // 128, outputs, dtype=torch.float16)
    int4 = pack_for_triton(Int4Weight(words, scales, torch.full_like(scales, 8, dtype=torch.int16), None))
    int8 = pack_for_triton(quantize_int8(torch.ones(outputs, inputs)))
    assert int4.nbytes - int4.locks.nbytes == budgets._matrix_bytes(outputs, inputs, 4, 128, CARD)
    assert int8.nbytes - int8.locks.nbytes == budgets._matrix_bytes(outputs, inputs, 8, inputs, CARD)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are made inside and still alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, tuple[int, int]] = {}  # by address: bytes, and tensors that share them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (address := tensor.untyped_storage().data_ptr()):
                size, owners = self._storages.get(address, (tensor.untyped_storage().nbytes(), 0))
                self.live += 0 if owners else size
                self.peak = max(self.peak, self.live)
                self._storages[address] = size, owners + 1
                weakref.finalize(tensor, self._drop, address)
        return result

    def _drop(self, address: int) -> None:
        size, owners = self._storages.pop(address)
        if owners > 1:
            self._storages[address] = size, owners - 1
        else:
            self.live -= size


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.slow
def test_packing_takes_what_was_estimated(device: str, desc_act: bool) -> None:
    quant = QuantConfig(desc_act=desc_act)
    published = published_config("Qwen/Qwen-VL-Chat-Int4")
    assert published is not None
    config = replace(published, quantization=quant)
    generator = torch.Generator().manual_seed(0)

    def read(name: str) -> tuple[Int4Weight, None]:
        outputs, inputs = projections(config)[name.removeprefix("h.")]
        groups = inputs // quant.group_size
        g_idx = torch.arange(inputs, dtype=torch.int32) // quant.group_size
        if desc_act:
            g_idx = g_idx[torch.randperm(inputs, generator=generator.manual_seed(0))]
        qweight = torch.randint(-(2**31), 2**31 - 1, (inputs // 8, outputs), dtype=torch.int32, generator=generator)
        zeros = pack_zeros(torch.full((groups, outputs), 8))
        scales = torch.ones(groups, outputs, dtype=torch.float16)
        return Int4Weight.from_gptq(qweight, zeros, scales, g_idx, group_size=quant.group_size), None

    with LiveBytes() as memory:
        if device == "cpu":
            pack_for_cpu(read("mlp.c_proj")[0])
            stays = 0  # what onnxruntime packs is no tensor
        else:
            block = fuse_block("h", lambda _: torch.ones(1), read)
            stays = sum(linear.weight.nbytes for linear in (block.c_attn, block.attn_c_proj, block.w1_w2))
    allowed = budgets._packing_bytes(config, CARD if device == "cuda" else CPU)
    assert allowed / 2 < memory.peak - stays <= allowed


@pytest.mark.parametrize(("kind", "dtype"), [("float16", torch.float32), ("int8", torch.int8)])
def test_a_cache_takes_what_was_estimated(kind: Any, dtype: torch.dtype) -> None:
    config = Config.from_dict(SMALL)
    cache = KVCache(config, 3, 100, dtype=dtype)
    assert estimate(config, replace(CPU, kv_cache=kind, context=100, slots=3)).kv_cache == cache.nbytes


def test_the_published_model_has_the_sizes_that_its_shapes_make() -> None:
    # shapes x bytes: 32 layers of 202.4 M weights at 4 bits and a float16 scale a group; 151,936 x 4,096 twice
    found = estimate(INT4, CARD)
    assert found.layers == pytest.approx(32 * 202.375168e6 * (0.5 + 2 / 128), rel=1e-3)
    assert (found.head, found.embeddings) == (2 * 151936 * 4096, 0)
    assert found.kv_cache == 2048 * 512 * 1024
    assert estimate(INT4, replace(CARD, embeddings="device")).embeddings == 2 * 151936 * 4096


# GB; "6g" has to fit a card with 6 GiB that shows no desktop
@pytest.mark.parametrize(("profile", "goal"), [("12g", 10.3), ("8g", 7.2), ("6g", 6.44)])
def test_every_profile_keeps_to_its_goal_at_2048_positions(profile: str, goal: float) -> None:
    name, plan = choose(INT4, CARD, profile=profile, memory=10**12, where="a card", context=2048)
    assert name == profile
    assert estimate(INT4, plan).total <= goal * GB


def test_8192_positions_run_under_12_gb_with_nothing_but_the_cache_in_int8() -> None:
    assert estimate(INT4, replace(CARD, kv_cache="int8", context=8192)).total < 12 * GB


def test_the_longest_context_is_the_one_that_a_loop_finds() -> None:
    rng = random.Random(0)
    positions = range(64, 8193, 64)
    for _ in range(20):
        plan = rng.choice([CARD, replace(CARD, kv_cache="int8", head="int8"), CPU])
        memory = rng.randrange(8 * GB, 22 * GB)
        fitting = [n for n in positions if estimate(INT4, replace(plan, context=n)).total <= memory]
        assert longest_context(INT4, plan, memory) == max(fitting, default=0)


def test_auto_gives_up_no_more_than_it_has_to() -> None:
    def chosen(memory: float, **options: Any) -> tuple[str, int]:
        name, plan = choose(INT4, CARD, profile="auto", memory=int(memory * GB), where="a card", **options)
        return name, plan.context

    assert chosen(24) == ("12g", 8192)
    assert chosen(11.5)[0] == "12g" and 4096 < chosen(11.5)[1] < 8192
    assert chosen(11.5, context=8192) == ("8g", 8192)
    assert chosen(8)[0] == "8g"
    assert chosen(6.3)[0] == "6g"
    assert chosen(5.95)[0] == "6g" and 512 <= chosen(5.95)[1] < 2048
    with pytest.raises(FitError, match="3.00 GB free"):
        chosen(3)


def test_every_remedy_that_is_named_makes_it_fit() -> None:
    applied = {
        "--release-vision": {"vision": "released"},
        "--vision-device cpu": {"vision": "elsewhere"},
        "--kv-cache int8": {"kv_cache": "int8"},
        "--head int8": {"head": "int8"},
        "--profile 8g": vars(PROFILES["8g"]),
        "--profile 6g": vars(PROFILES["6g"]),
    }
    named = set()
    for memory in range(5 * GB, 14 * GB, GB // 4):
        for plan in (replace(CARD, context=4096), replace(CARD, context=8192)):
            if estimate(INT4, plan).total <= memory:
                continue
            for remedy in remedies(INT4, plan, memory):
                flags = remedy.split(" (")[0]
                named.add(flags.split()[0])
                changes = applied.get(flags) or {"context": int(flags.split()[1])}
                assert estimate(INT4, replace(plan, **changes)).total <= memory, flags
            assert f"{memory / 1e9:.2f} GB free" in str(does_not_fit(INT4, plan, memory, "a card"))
    assert named == {"--max-context", "--release-vision", "--vision-device", "--kv-cache", "--head", "--profile"}


@pytest.mark.parametrize(("profile", "vit"), [("12g", "int8"), ("8g", "float16"), ("8g", "int4"), ("6g", "int8")])
def test_a_tower_that_is_not_the_profiles_is_refused_with_the_command_that_makes_it(profile: str, vit: str) -> None:
    with pytest.raises(ConfigError, match=f"is in {vit}.*\n.*--dtype {PROFILES[profile].vit}"):
        choose(INT4, CARD, profile=profile, memory=10**12, where="a card", vit=vit)
    with pytest.raises(ConfigError, match="known are 'auto', '12g'"):
        choose(INT4, CARD, profile="10g", memory=10**12, where="a card")


def test_loading_refuses_before_it_allocates(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for loader in ("load_decoder", "load_fused", "exported_vit"):
        monkeypatch.setattr(f"qvl_edge.load.{loader}", None)
    with pytest.raises(FitError, match=r"cpu has 0.01 GB free \(layers"):
        Runtime.from_pretrained(small_checkpoint, max_memory="10MB")
    monkeypatch.setattr("qvl_edge.memory.host_memory", lambda: Memory(2**30, 0))
    monkeypatch.setattr("qvl_edge.memory.resident_bytes", lambda: 0)
    with pytest.raises(FitError, match="0.00 GB free"):
        Runtime.from_pretrained(small_checkpoint)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12GB", 12 * 10**9),
        ("12GiB", 12 * 2**30),
        ("1.5 gb", 1_500_000_000),
        ("800MB", 800_000_000),
        ("12", 12 * 10**9),
        ("12G", 12 * 10**9),
        ("8000000000", 8 * 10**9),
        (77, 77),
    ],
)
def test_amounts_of_memory_are_read_as_people_write_them(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "12 XB", "-3GB", "0GB", "1e9GB", "5000"])
def test_what_is_no_amount_of_memory_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigError, match="12GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("name", NAMES)
def test_fit_answers_for_a_model_that_is_not_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", name, "--gpu", "8GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["profiles"]
    assert [found[profile]["fits"] for profile in PROFILES] == [False, True, True]
    assert main(["fit", name, "--gpu", "8GB"]) == 0
    shown = capsys.readouterr().out
    assert "too large" in shown and "longest context" in shown and ("quantize.gptq" in shown) == ("Int4" not in name)
    assert max(len(line) for line in shown.splitlines()) <= 100
    assert main(["fit", name, "--gpu", "2GB"]) == 1


def test_fit_says_which_profiles_a_bundles_tower_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(SMALL_MODEL / "config.json", tmp_path)
    for tower, profile in (("float16", "12g"), ("float32", "12g"), ("int8", "8g"), ("int4", "6g")):
        vit = {"fingerprint": "x", "files": {}, "dtype": tower}
        (tmp_path / MANIFEST).write_text(json.dumps({"format_version": FORMAT_VERSION, "parts": {"vit": vit}}))
        assert main(["fit", str(tmp_path), "--cpu", "4GB"]) == 0
        assert f"its vision tower is in {tower}: profile {profile};" in capsys.readouterr().out


def test_fit_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ([str(tmp_path)], "config.json is missing"),
        (["Qwen/Qwen-VL", "--gpu", "lots"], "12GiB"),
        (["Qwen/Qwen-VL", "--gpu", "8GB", "--context", "9000"], "1 to 8192 positions"),
        (["Qwen/Qwen-VL", "--gpu", "8GB", "--images", "0"], "at least 1"),
    ):
        assert main(["fit", *arguments]) == 1
        assert said in capsys.readouterr().err


def test_what_slots_sort_and_what_graphs_take_is_in_the_budget_of_a_card() -> None:
    one, many = (estimate(INT4, replace(CARD, slots=slots)) for slots in (1, 16))
    step = INT4.vocab_size * 16 * (1 + 4 + 4 + 4 + 6 * 4)  # penalties, noise and bias of each slot; a sorted row
    assert many.workspace - one.workspace > step * 15 // 16
    assert one.vision - estimate(INT4, replace(CARD, images=1, vision="released")).vision > 3.9 * GB
    more = estimate(INT4, replace(CARD, images=4)).vision
    assert more - one.vision > 3 * 1024 * 4 * 1664  # onnxruntime keeps what the largest batch took
