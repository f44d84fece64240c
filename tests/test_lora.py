"""A LoRA adapter merged on the way, against the formula in float64; and adapters that do not belong."""

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_small_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from export import vit
from quantize import gptq
from qvl_edge.bundle import Bundle
from qvl_edge.checkpoint import VISUAL, Checkpoint
from qvl_edge.errors import CheckpointError, ConfigError
from qvl_edge.lora import LoraCheckpoint
from qvl_edge.model.loading import load_decoder
from qvl_edge.vit_cache import exported_vit

RANK, ALPHA = 4, 12
TARGETS = ["c_attn", "attn.c_proj", "w1", "w2"]  # of Qwen-VL's finetune.py
TOLERANCE = 2.0**-11  # relative to the largest weight: one rounding to float16, the base's dtype
WTE = "base_model.model.transformer.wte"
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_small_checkpoint(tmp_path_factory.mktemp("lora") / "base"))


def write_adapter(folder: Path, base: Checkpoint, change: Change | None = None, *, file: str = "safetensors") -> Path:
    """A random adapter as finetune.py --use_lora leaves it; `change` gets its settings and its tensors."""
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(TARGETS),
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "bias": "none",
    }
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in base.names:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(tuple(f".{target}" for target in TARGETS)):
            n_out, n_in = base.shape(name)
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, n_in, generator=generator)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(n_out, RANK, generator=generator) * 0.01
    if change is not None:
        change(settings, tensors)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if file == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def formula(base: Checkpoint, tensors: dict[str, Tensor], name: str, scale: float) -> Tensor:
    """W + scale * B @ A in float64."""
    key = f"base_model.model.{name.removesuffix('.weight')}"
    a, b = (tensors[f"{key}.lora_{part}.weight"].double() for part in "AB")
    return base[name].double() + scale * b @ a


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < TOLERANCE


@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_merged_tensors_are_w_plus_scale_times_b_a(file: str, base: Checkpoint, tmp_path: Path) -> None:
    kept: dict[str, Tensor] = {}
    merged = LoraCheckpoint(
        base.path, write_adapter(tmp_path / "a", base, lambda _, tensors: kept.update(tensors), file=file)
    )
    assert merged.names == base.names
    changed = [name for name in base.names if not torch.equal(merged[name], base[name])]
    assert changed == sorted(
        f"transformer.h.{index}.{layer}.weight"
        for index in range(2)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")
    )
    for name in changed:
        assert merged[name].dtype == torch.float16
        assert merged.shape(name) == tuple(merged[name].shape)
        assert_close(merged[name], formula(base, kept, name, ALPHA / RANK))
        assert float((merged[name] - base[name]).abs().max()) > 50 * TOLERANCE * float(base[name].abs().max())
        merged.release(name)
        assert_close(merged[name], formula(base, kept, name, ALPHA / RANK))
    load_decoder(merged, dtype=torch.float32)


def test_the_base_on_disk_and_in_memory_stays_as_it_was(tmp_path: Path) -> None:
    """A float32 base is mapped and needs no conversion: adding in place would write into it."""
    folder = write_small_checkpoint(tmp_path / "base")
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    base = Checkpoint(folder)
    merged = LoraCheckpoint(folder, write_adapter(tmp_path / "a", base))
    name = "transformer.h.0.mlp.w1.weight"
    first, again = merged[name], merged[name]
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert torch.equal(base[name], tensors[name])


def test_rslora_and_patterns_change_rank_and_scale(base: Checkpoint, tmp_path: Path) -> None:
    kept: dict[str, Tensor] = {}

    def change(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        settings |= {
            "use_rslora": True,
            "rank_pattern": {"h.1.mlp.w1": 2},
            "alpha_pattern": {r"h\.\d+\.attn\.c_proj": 5},
        }
        key = "base_model.model.transformer.h.1.mlp.w1"
        tensors[f"{key}.lora_A.weight"] = tensors[f"{key}.lora_A.weight"][:2].contiguous()
        tensors[f"{key}.lora_B.weight"] = tensors[f"{key}.lora_B.weight"][:, :2].contiguous()
        kept.update(tensors)

    merged = LoraCheckpoint(base.path, write_adapter(tmp_path / "a", base, change))
    for module, scale in (
        ("transformer.h.0.mlp.w1", ALPHA / math.sqrt(RANK)),
        ("transformer.h.1.mlp.w1", ALPHA / math.sqrt(2)),
        ("transformer.h.0.attn.c_proj", 5 / math.sqrt(RANK)),
        ("transformer.h.1.attn.c_attn", ALPHA / math.sqrt(RANK)),
    ):
        assert_close(merged[f"{module}.weight"], formula(base, kept, f"{module}.weight", scale))


def test_whole_tensors_take_the_place_of_the_bases(base: Checkpoint, tmp_path: Path) -> None:
    """modules_to_save of a fine-tune of the base model: wte and lm_head, here in float32."""
    table, head = torch.randn(512, 128), torch.randn(512, 128)

    def change(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        settings["modules_to_save"] = ["wte", "lm_head"]
        tensors["base_model.model.transformer.wte.weight"] = table
        tensors["base_model.model.lm_head.weight"] = head

    merged = LoraCheckpoint(base.path, write_adapter(tmp_path / "a", base, change))
    merged.release("lm_head.weight")
    assert torch.equal(merged["lm_head.weight"], head.half())
    assert torch.equal(merged["transformer.wte.weight"], table.half())


@pytest.mark.parametrize("own", ["", ".default"])
@pytest.mark.parametrize("whole", [False, True])
def test_an_embedding_is_trained_transposed(own: str, whole: bool, base: Checkpoint, tmp_path: Path) -> None:
    """PEFT's tuners/lora/layer.py, Embedding.get_delta_weight; `whole`: save_embedding_layers keeps its base too."""
    a, b, table = torch.randn(RANK, 512), torch.randn(128, RANK), torch.randn(512, 128).half()

    def change(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        settings["target_modules"] = [*TARGETS, "wte"]
        tensors[f"{WTE}.lora_embedding_A{own}"], tensors[f"{WTE}.lora_embedding_B{own}"] = a, b
        if whole:
            tensors[f"{WTE}.base_layer.weight"] = table

    merged = LoraCheckpoint(base.path, write_adapter(tmp_path / "a", base, change))
    start = table if whole else base["transformer.wte.weight"]
    assert_close(merged["transformer.wte.weight"], start.double() + ALPHA / RANK * (b.double() @ a.double()).T)


def test_an_adapter_that_leaves_the_tower_alone_uses_the_one_that_is_there(base: Checkpoint, tmp_path: Path) -> None:
    def visual(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        name = next(n for n in base.names if n.startswith(VISUAL) and n.endswith(".weight"))
        tensors[f"base_model.model.{name}"] = base[name].clone()

    cache = tmp_path / "cache"
    tower = exported_vit(base, dtype="float32", cache_dir=cache)
    without = LoraCheckpoint(base.path, write_adapter(tmp_path / "a", base))
    assert exported_vit(without, dtype="float32", cache_dir=cache) == tower
    touched = LoraCheckpoint(base.path, write_adapter(tmp_path / "b", base, visual))
    assert exported_vit(touched, dtype="float32", cache_dir=cache) != tower


def test_both_commands_stamp_the_same_fingerprint_which_is_not_the_bases(
    base: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, bundle = write_adapter(tmp_path / "a", base), tmp_path / "bundle"
    options = [str(base.path), str(bundle), "--lora", str(adapter)]
    assert gptq.main([*options, "--round-to-nearest", "--group-size", "64"]) == 0
    assert vit.main(options[:2]) == 1  # the base's tower: a half of another model
    assert "decoder of another model" in capsys.readouterr().err
    assert vit.main(options) == 0
    found = Bundle.open(bundle, verify=True).fingerprint
    assert found == LoraCheckpoint(base.path, adapter).fingerprint != base.fingerprint


def test_the_bundle_is_that_of_the_merged_checkpoint(base: Checkpoint, tmp_path: Path) -> None:
    """Merged by hand and saved, the same checkpoint gives the same bytes."""
    adapter = write_adapter(tmp_path / "a", base)
    merged = LoraCheckpoint(base.path, adapter)
    by_hand = write_small_checkpoint(tmp_path / "by_hand")
    save_file({name: merged[name].clone() for name in merged.names}, by_hand / "model.safetensors")
    for source, options, folder in ((base.path, ["--lora", str(adapter)], "x"), (by_hand, [], "y")):
        command = [str(source), str(tmp_path / folder), "--round-to-nearest", "--group-size", "64", *options]
        assert gptq.main(command) == 0
    for file in (tmp_path / "x").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "y" / file.name).read_bytes()


def test_the_fingerprint_tells_adapters_and_their_scales_apart(base: Checkpoint, tmp_path: Path) -> None:
    def other(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.transformer.h.1.mlp.w2.lora_B.weight"][100, 3] += 1e-3

    def louder(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        settings["lora_alpha"] = 13

    prints = {
        LoraCheckpoint(base.path, write_adapter(tmp_path / name, base, change, file=file)).fingerprint
        for name, change, file in (
            ("a", None, "safetensors"),
            ("bin", None, "bin"),  # the same adapter
            ("other", other, "safetensors"),
            ("louder", louder, "safetensors"),
        )
    }
    assert len(prints) == 3


def as_in_memory(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The names of a PeftModel's own state, with the adapter's name in them, and wte trained along."""
    settings["modules_to_save"] = ["wte"]
    for key in list(tensors):
        tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)
    wte = "base_model.model.transformer.wte"
    tensors[f"{wte}.modules_to_save.default.weight"] = torch.ones(512, 128)
    tensors[f"{wte}.original_module.weight"] = torch.zeros(512, 128)


# as ms-swift writes them: a pattern over all modules of a part, norms too, without the ones that it names
SWIFT = {
    "target_modules": r"^(transformer\.h)(?!.*(lm_head|emb|wte|mlp\.c_proj)).*",
    "lora_dtype": None,
    "task_type": "CAUSAL_LM",
}


def test_adapters_of_other_trainers_give_the_same_weights(base: Checkpoint, tmp_path: Path) -> None:
    plain = LoraCheckpoint(base.path, write_adapter(tmp_path / "plain", base))
    swift = LoraCheckpoint(base.path, write_adapter(tmp_path / "swift", base, setting(**SWIFT)))
    memory = LoraCheckpoint(base.path, write_adapter(tmp_path / "memory", base, as_in_memory))
    excluded = setting(target_modules=[*TARGETS, "mlp.c_proj"], exclude_modules=r".*\.mlp\.c_proj")
    without = LoraCheckpoint(base.path, write_adapter(tmp_path / "excluded", base, excluded))
    everything = setting(target_modules=r"transformer\.(?!visual)(?!.*mlp\.c_proj).*")  # wte and norms too
    assert LoraCheckpoint(base.path, write_adapter(tmp_path / "all", base, everything)).names == base.names
    for name in base.names:
        for other in (swift, memory, without):
            if not (other is memory and name == "transformer.wte.weight"):
                assert torch.equal(other[name], plain[name]), name
    assert memory["transformer.wte.weight"].eq(1).all()
    assert swift.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.nan, r"adapter_model\.safetensors: .*w1\.lora_B\.weight holds NaN.*training diverged"),
        (1e6, "exceed 65504"),
    ],
)
def test_values_that_are_not_finite_are_the_adapters_and_not_the_checkpoints(
    value: float, message: str, base: Checkpoint, tmp_path: Path
) -> None:
    def change(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"{W1}.lora_B.weight"][3] = value

    merged = LoraCheckpoint(base.path, write_adapter(tmp_path / "a", base, change))
    with pytest.raises(CheckpointError, match=message):
        load_decoder(merged, dtype=torch.float32)


def drop(key: str) -> Change:
    return lambda settings, tensors: tensors.__delitem__(f"base_model.model.{key}")


def setting(**changes: Any) -> Change:
    return lambda settings, tensors: settings.update(changes)


def tensor(key: str, *shape: int) -> Change:
    return lambda settings, tensors: tensors.update({key: torch.zeros(shape)})


W1 = "base_model.model.transformer.h.0.mlp.w1"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (tensor(f"{W1}.lora_A.weight", 4, 256), CheckpointError, r"A \(4, 256\) and B \(256, 4\).*is \(256, 128\)"),
        (setting(r=8), CheckpointError, r"A \(4, 128\) and B \(384, 4\) with rank 8"),
        (drop("transformer.h.1.mlp.w2.lora_B.weight"), CheckpointError, r"w2\.lora_A\.weight and not .*w2\.lora_B"),
        (
            tensor("base_model.model.model.layers.0.q_proj.lora_magnitude_vector", 4),
            ConfigError,
            "DoRA.*merge_and_unload",
        ),
        (tensor(f"{W1}.lora_A.weight", 0), CheckpointError, r"w1\.lora_A\.weight is empty.*ZeRO-3"),
        (tensor("base_model.model.lm_head.weight", 0), CheckpointError, r"lm_head\.weight is empty.*ZeRO-3"),
        (tensor(f"{WTE}.lora_embedding_A", 4, 512), CheckpointError, r"wte\.lora_embedding_A and not .*wte\.lora_B"),
        (setting(target_modules=[*TARGETS, "wte"]), CheckpointError, "lacks 1 of the 9 .*target_modules"),
        (
            setting(target_modules=".*", exclude_modules=["lm_head"]),
            CheckpointError,
            "lacks .* of the .*target_modules",
        ),
        (tensor("transformer.wte.weight", 512, 128), CheckpointError, "not a plain LoRA"),
        (tensor("base_model.model.lm_head.weight", 500, 128), CheckpointError, r"is \(500, 128\), and .*\(512, 128\)"),
        (setting(target_modules=[*TARGETS, "mlp.c_proj"]), CheckpointError, "lacks 4 of the 12 .*target_modules"),
        (setting(target_modules=r".*\.h\.\d\.mlp\..*"), CheckpointError, "lacks 2 of the 6 tensors"),
        (setting(modules_to_save=["wte", "lm_head"]), CheckpointError, "lacks 2 of the 2 tensors.*modules_to_save"),
        (
            setting(bias="lora_only"),
            CheckpointError,
            r"lacks 2 of the 2 tensors that bias in.*h\.0\.attn",
        ),
        (setting(use_dora=True), ConfigError, "use_dora is True.*merge_and_unload"),
        (setting(init_lora_weights="pissa"), ConfigError, "init_lora_weights is 'pissa'"),
        (setting(peft_type="IA3"), ConfigError, "peft_type is 'IA3', only 'LORA'"),
        (setting(r=None), ConfigError, "r is None, expected a number"),
        (setting(rank_pattern={"w1": 0}), ConfigError, r"the rank of transformer\.h\.0\.mlp\.w1 is 0"),
    ],
)
def test_an_adapter_that_does_not_belong_is_named(
    change: Change, error: type[Exception], message: str, base: Checkpoint, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "a", base, change)
    with pytest.raises(error, match=message):
        LoraCheckpoint(base.path, adapter)


def test_a_module_of_another_model_is_named(base: Checkpoint, tmp_path: Path) -> None:
    def change(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for part in "AB":
            tensors[f"base_model.model.model.layers.0.q_proj.lora_{part}.weight"] = torch.zeros(4, 4)

    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.0\.q_proj\.weight.*another model"):
        LoraCheckpoint(base.path, write_adapter(tmp_path / "a", base, change))


def test_a_quantized_base_is_refused(base: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gptq.main([str(base.path), str(tmp_path / "int4"), "--round-to-nearest", "--group-size", "64"]) == 0
    adapter = write_adapter(tmp_path / "a", base)
    with pytest.raises(ConfigError, match="give the float checkpoint"):
        LoraCheckpoint(tmp_path / "int4", adapter)


def test_a_folder_without_an_adapter_is_named(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter_config\.json is missing"):
        LoraCheckpoint(base.path, tmp_path)
    adapter = write_adapter(tmp_path / "a", base)
    with pytest.raises(
        ConfigError, match=r"adapter_config\.json is missing; there are adapters below it, give one of a"
    ):
        LoraCheckpoint(base.path, tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither adapter_model\.safetensors nor adapter_model\.bin"):
        LoraCheckpoint(base.path, adapter)


def test_a_bin_adapter_with_code_in_it_is_refused_unrun(base: Checkpoint, tmp_path: Path) -> None:
    adapter, marker = write_adapter(tmp_path / "a", base), tmp_path / "ran"
    (adapter / "adapter_model.safetensors").unlink()

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(marker), "w")

    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({"a": Payload()}, protocol=2))
    with pytest.raises(CheckpointError, match="tensors only"):
        LoraCheckpoint(base.path, adapter)
    assert not marker.exists()


@pytest.mark.parametrize(("pattern", "said"), [(r"(.|.)*[XY]", "takes more than"), ("(", "no regular expression")])
def test_a_pattern_that_hangs_or_is_none_is_refused(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, said: str
) -> None:
    monkeypatch.setattr("qvl_edge.lora._PATTERN_S", 0.05)
    adapter = write_adapter(tmp_path / "adapter", base)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": pattern}))
    with pytest.raises(ConfigError, match=said):
        LoraCheckpoint(base.path, adapter)
