"""A checkpoint that is int4 already (Qwen-VL-Chat-Int4): check every layer and copy its decoder as it is."""

from pathlib import Path

from torch import Tensor

from kernels import Int4Weight, check_gptq
from quantize.blocks import block_name
from quantize.files import check_source, held_bytes, open_work, shard_name, write_outer, write_settings
from quantize.job import Event, Progress, ignore
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.errors import CheckpointError, ConfigError
from qvl_edge.files import check_free_space, write_tensors
from qvl_edge.model.loading import GPTQ_WEIGHT, QUANTIZED, check_tensors, expected_tensors
from qvl_edge.model.streaming import check_finite


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
    check_tensors(checkpoint)
    check_source(checkpoint)
    settings = {
        "fingerprint": checkpoint.fingerprint,
        "method": "copy",
        "quantization": quant.to_dict(),
        "calibration": None,
        "device": None,
    }
    held = [name for name in expected_tensors(checkpoint.config, visual=False) if name in checkpoint]
    needed = sum(checkpoint.nbytes(name) for name in held)
    with open_work(folder, checkpoint.path, settings, overwrite=overwrite) as work:
        if work is None:
            return False
        if work.is_ready:
            work.publish()
            return True
        check_free_space(folder, needed - held_bytes(folder))
        work.begin()
        blocks = checkpoint.config.num_hidden_layers
        for index in range(blocks):
            shard = work / shard_name(index, blocks)
            if not shard.exists():
                names = [name for name in held if name.startswith(f"{block_name(index)}.")]
                write_tensors(shard, _checked_block(checkpoint, index, names))
                for name in names:
                    checkpoint.release(name)
            progress(Event((index + 1) / (blocks + 1), f"block {index + 1}/{blocks}: checked and copied"))
        write_outer(work, checkpoint)
        progress(Event(1.0, "embeddings and head copied"))
        work.publish(write_settings(work, checkpoint, quant, None))
    return True


def _checked_block(checkpoint: Checkpoint, index: int, names: list[str]) -> dict[str, Tensor]:
    """The tensors of block `index`. CheckpointError names a layer whose parts contradict one another."""
    quant = checkpoint.config.quantization
    assert quant is not None
    tensors = {name: checkpoint[name] for name in names}
    for layer in QUANTIZED:
        name = f"{block_name(index)}.{layer}"
        packed = [tensors[f"{name}.{part}"] for part in GPTQ_WEIGHT]
        try:
            check_gptq(*packed, bits=quant.bits, group_size=quant.group_size, name=name)
            if quant.bits == 4:  # what the runtime will do with it
                Int4Weight.from_gptq(
                    *packed, group_size=quant.group_size, checkpoint_format=quant.checkpoint_format, name=name
                )
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            check_finite(name, tensor)
    return tensors
