"""A checkpoint that is int4 already (Qwen-VL-Chat-Int4): check every layer and take its decoder over as it is."""

from pathlib import Path

import torch
from torch import Tensor

from kernels import Int4Weight
from kernels.int4_layout import check_gptq
from quantize.layout import check_source, decoder_bytes, shard_name, write_outer, write_settings
from quantize.progress import Event, Progress, ignore
from quantize.work import held_bytes, open_work
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config
from qvl_edge.errors import CheckpointError, ConfigError
from qvl_edge.files import check_free_space, write_tensors
from qvl_edge.model.loading import GPTQ_TENSORS, QUANTIZED, check_tensors, expected_tensors


def repack_checkpoint(
    checkpoint: Checkpoint, folder: Path, *, overwrite: bool = False, progress: Progress = ignore
) -> bool:
    """Copy a GPTQ checkpoint's decoder into `folder`; False if the bundle was finished already.

    Tensors keep their bytes, and the format ("gptq" or "gptq_v2") stays. CheckpointError or BundleError names what is
    wrong, with the layer.
    """
    quant = checkpoint.config.quantization
    if quant is None:
        raise ConfigError(f"{checkpoint.path} is not quantized; there is nothing to copy")
    check_tensors(checkpoint, visual=False)
    check_source(checkpoint)
    settings = {
        "fingerprint": checkpoint.fingerprint,
        "method": "copy",
        "quantization": quant.to_dict(),
        "calibration": None,
        "device": None,
    }
    needed = decoder_bytes(checkpoint, checkpoint.config)
    with open_work(folder, checkpoint.path, settings, overwrite=overwrite) as work:
        if work is None:
            return False
        if work.is_ready:
            work.publish()
            return True
        check_free_space(folder, needed - held_bytes(folder))
        work.begin()
        blocks = checkpoint.config.num_hidden_layers
        by_block = _names_by_block(checkpoint.config)
        for index in range(blocks):
            shard = work / shard_name(index, blocks)
            if not shard.exists():
                write_tensors(shard, _checked_block(checkpoint, index, by_block[index]))
                for name in by_block[index]:
                    checkpoint.release(name)
            progress(Event((index + 1) / (blocks + 1), f"block {index + 1}/{blocks}: checked and copied"))
        write_outer(work, checkpoint)
        progress(Event(1.0, "embeddings and head copied"))
        work.publish(write_settings(work, checkpoint, quant, None))
    return True


def _names_by_block(config: Config) -> list[list[str]]:
    """Tensor names of each block."""
    names: list[list[str]] = [[] for _ in range(config.num_hidden_layers)]
    for name in expected_tensors(config, visual=False):
        if name.startswith("transformer.h."):
            names[int(name.split(".")[2])].append(name)
    return names


def _checked_block(checkpoint: Checkpoint, index: int, names: list[str]) -> dict[str, Tensor]:
    """The tensors of block `index`. CheckpointError names a layer whose parts contradict one another."""
    quant = checkpoint.config.quantization
    assert quant is not None
    tensors = {name: checkpoint[name] for name in names}
    for layer in QUANTIZED:
        name = f"transformer.h.{index}.{layer}"
        packed = [tensors[f"{name}.{part}"] for part in GPTQ_TENSORS[:4]]
        try:
            check_gptq(*packed, bits=quant.bits, group_size=quant.group_size, name=name)
            if quant.bits == 4:  # what the runtime will do with it
                Int4Weight.from_gptq(
                    *packed, group_size=quant.group_size, checkpoint_format=quant.checkpoint_format, name=name
                )
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} holds NaN or infinity; the checkpoint is damaged, copy it again")
    return tensors
