"""The files of a finished decoder besides its blocks: the last shard, the index, and the settings."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quantize.finite import is_finite
from quantize.shard import write_shard
from quantize.work import WorkFolder
from qvl_edge.checkpoint import SAFETENSORS_INDEX, Checkpoint
from qvl_edge.config import Config, QuantConfig
from qvl_edge.errors import CheckpointError, ConfigError
from qvl_edge.files import copy_file, read_json, write_json
from qvl_edge.model.loading import QUANTIZED, expected_tensors, gptq_shapes
from qvl_edge.text.tokenizer import VOCAB_FILE

REPORT = "quantize_report.json"
OUTER = ("transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight")  # all that is not in a block
_COPIED = ("generation_config.json", "tokenizer_config.json")  # where the source has them


def shard_name(index: int, blocks: int) -> str:
    """File of block `index` (from 0); index == blocks is the last shard, with embeddings, final norm and head."""
    return f"model-{index + 1:05d}-of-{blocks + 1:05d}.safetensors"


def int4_config(config: Config, quant: QuantConfig) -> Config:
    """The config of the quantized decoder. ConfigError if a projection does not fit the packing or the groups."""
    per_word = 32 // quant.bits
    result = replace(config, quantization=quant)
    for layer in QUANTIZED:
        shapes = gptq_shapes(result, layer)  # ConfigError if the groups do not divide the inputs
        for what, size in (("inputs", shapes["g_idx"][0]), ("outputs", shapes["bias"][0])):
            if size % per_word:
                raise ConfigError(f"{layer} has {size} {what}, {quant.bits}-bit packing needs a multiple of {per_word}")
    return result


def decoder_bytes(checkpoint: Checkpoint, quantized: Config) -> int:
    """Bytes of the decoder's files, headers left out."""
    total = 0
    for name, shape in expected_tensors(quantized, visual=False).items():
        part = name.rpartition(".")[2]
        size = 4 if part in ("qweight", "qzeros", "g_idx") else 2
        if name in checkpoint:
            size = checkpoint[name].element_size()
        total += size * int(torch.Size(shape).numel())
    return total


def write_outer(work: WorkFolder, checkpoint: Checkpoint) -> None:
    """The last shard, in the source's dtype. CheckpointError if a value is not finite."""

    def pieces(name: str) -> Iterator[Tensor]:
        for rows in checkpoint[name].split(4096):  # 34 MB of the published tables
            if not is_finite(rows):
                raise CheckpointError(f"{name} holds NaN or infinity; the checkpoint is damaged, copy it again")
            yield rows
            checkpoint.release(name)

    blocks = checkpoint.config.num_hidden_layers
    layout = {name: (checkpoint[name].dtype, checkpoint.shape(name)) for name in OUTER}
    write_shard(work / shard_name(blocks, blocks), layout, pieces)


def write_settings(
    work: WorkFolder, checkpoint: Checkpoint, quant: QuantConfig, report: Mapping[str, Any] | None
) -> list[str]:
    """Index, configs, tokenizer and report into the work folder; returns all files that the finished decoder has."""
    blocks = checkpoint.config.num_hidden_layers
    shards = [shard_name(index, blocks) for index in range(blocks + 1)]
    weight_map, total = _index(work.path, shards)
    write_json(work / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    source = checkpoint.path
    write_json(work / "config.json", read_json(source / "config.json") | {"quantization_config": quant.to_dict()})
    write_json(work / "quantize_config.json", quant.to_dict())
    copied = [VOCAB_FILE, *(name for name in _COPIED if (source / name).exists())]
    for name in copied:
        copy_file(source / name, work / name)
    if report is not None:
        write_json(work / REPORT, report)
    own = ["config.json", "quantize_config.json", SAFETENSORS_INDEX, *([] if report is None else [REPORT])]
    return [*shards, *own, *copied]


def _index(folder: Path, shards: Iterable[str]) -> tuple[dict[str, str], int]:
    """Where every tensor lies, and the bytes of all."""
    weight_map, total = {}, 0
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            for name in file.keys():
                weight_map[name] = shard
                total += file.get_tensor(name).nbytes
    return dict(sorted(weight_map.items())), total


def check_source(checkpoint: Checkpoint) -> None:
    """CheckpointError if a file that the bundle takes over is missing."""
    if not (checkpoint.path / VOCAB_FILE).is_file():
        raise CheckpointError(f"{checkpoint.path} lacks {VOCAB_FILE}; copy it from the source of the checkpoint")
