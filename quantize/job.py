"""A float checkpoint -> the int4 decoder of a bundle, block by block, resumable."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantize.blocks import (
    LayerReport,
    Streams,
    Tick,
    block_tensors,
    load_block,
    quantize_block,
    round_block,
    run_block,
    run_float,
)
from quantize.calibration import Activations, Put, activation_bytes, embed_samples, writing
from quantize.estimate import Workload, duration, size
from quantize.files import (
    REPORT,
    WorkFolder,
    check_source,
    decoder_bytes,
    held_bytes,
    int4_config,
    open_work,
    shard_name,
    write_outer,
    write_settings,
)
from quantize.solver import FULL, Method
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config, QuantConfig
from qvl_edge.engine.device import find_device
from qvl_edge.errors import BundleError, CalibrationError, ConfigError
from qvl_edge.files import read_json, write_json, write_tensors
from qvl_edge.model.decoder import QWenBlock
from qvl_edge.model.loading import check_tensors
from qvl_edge.text.conversations import Sample, digest_of


@dataclass(frozen=True)
class Event:
    """A step forward: the share that is done (0 … 1), what is running, and the projection that was just finished."""

    fraction: float
    text: str
    layer: LayerReport | None = None
    resumed: bool = False  # the layer was finished by an earlier run
    lasting: bool = False  # the text is to stay on the screen, not to be replaced by the next event's


Progress = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A progress function that shows nothing."""
    del event


@dataclass(frozen=True)
class Result:
    """What a run did."""

    layers: list[LayerReport]  # of the whole decoder, also what an earlier run finished; empty for a copied one
    already_done: bool = False  # the bundle was finished with these settings
    resumed_blocks: int = 0  # blocks that an earlier run had finished


def quantize_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    quant: QuantConfig,
    samples: Sequence[Sample] | None,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = ignore,
    method: Method = FULL,
) -> Result:
    """Quantize a float checkpoint's decoder into `folder` by GPTQ over `samples`, or round it to nearest if None.

    Stopped at any moment, the same call resumes after the last finished block and ends in the same bytes.
    device: "auto", "cpu", "cuda" or "cuda:N". method: the steps beyond GPTQ as published.
    ConfigError, CheckpointError, CalibrationError or BundleError say what is wrong, before anything is written where
    that can be known.
    """
    place = find_device(device, kernels=False)  # GPTQ is plain torch
    config = checkpoint.config
    if config.quantization is not None:
        raise ConfigError(
            f"{checkpoint.path} is quantized already; python -m quantize.gptq copies it without calibration"
        )
    if samples is not None and not samples:
        raise CalibrationError("there is no calibration sample")
    if samples is None and (quant.desc_act or quant.static_groups):
        raise ConfigError(
            "desc_act and static_groups order channels by their activations; rounding to nearest has none"
        )
    check_tensors(checkpoint)
    check_source(checkpoint)
    quantized_config = int4_config(config, quant)
    calibration: dict[str, Any] | None = None
    if samples is not None:
        tokens = sum(len(sample.ids) for sample in samples)
        calibration = {"samples": len(samples), "tokens": tokens, "sha256": digest_of(samples)}
    settings = {
        "fingerprint": checkpoint.fingerprint,
        "method": "round-to-nearest" if samples is None else "gptq",
        "beyond_gptq": None if samples is None else asdict(method),
        "quantization": quant.to_dict(),
        "calibration": calibration,
        "device": place.type,  # a GPU rounds differently from a CPU in the last bits
    }
    workload = Workload(
        config,
        quant,
        [len(sample.ids) for sample in samples or ()],
        len({key for sample in samples or () for key in sample.image_keys}),
        place,
        method,
    )
    with open_work(folder, checkpoint.path, settings, overwrite=overwrite) as work:
        if work is None:
            return Result(_read_rows(folder / REPORT), already_done=True)
        resumed = _blocks_done(work, config)
        if work.is_ready:
            layers = _all_rows(work, config)
            work.publish()
            return Result(layers, resumed_blocks=resumed)
        _check_resources(workload, folder, decoder_bytes(checkpoint, quantized_config), progress)
        work.begin()
        with torch.inference_mode():
            _Walk(checkpoint, work, workload, samples, progress).run(resumed)
        layers = _all_rows(work, config)
        report = {
            "method": settings["method"],
            "error": "relative squared error of the weights" if samples is None else "of the outputs on the samples",
            "calibration": calibration,
            "layers": [asdict(layer) for layer in layers],
        }
        work.publish(write_settings(work, checkpoint, quant, report))
    return Result(layers, resumed_blocks=resumed)


def _check_resources(workload: Workload, folder: Path, decoder: int, progress: Progress) -> None:
    """Report the memory, disk and time that the run takes. BundleError or ConfigError if disk or memory is too small.

    decoder: bytes of the finished files.
    """
    # what enters a block and the next one, side by side, and the same of the float model
    files = 4 if workload.method.follow else 2
    inputs = files * activation_bytes(workload.lengths, workload.config.hidden_size)
    workload.check_memory()
    needed, free = decoder + inputs - held_bytes(folder), shutil.disk_usage(folder).free
    if free < needed:
        smaller = (
            f"; {size(inputs)} are for calibration: fewer --samples or a shorter --seqlen need less" if inputs else ""
        )
        raise BundleError(
            f"{folder} needs {size(needed)} and its disk has {size(free)} free; free some space, or choose a folder on "
            f"another disk{smaller}"
        )
    takes, rate = workload.seconds()
    memory = f"{size(workload.host_bytes)} of memory"
    if workload.on_cuda:
        memory += f", {size(workload.device_bytes)} on the GPU"
    disk = f"{size(decoder + inputs)} of disk, of which {size(decoder)} stay"
    time = f"about {duration(takes)} at the {rate / 1e9:.0f} GFLOP/s just measured"
    progress(Event(0.0, f"estimate: {memory}; {disk}; {time}", lasting=True))


def _rows_name(index: int) -> str:
    return f"rows-{index:05d}.json"


def _inputs_name(index: int) -> str:
    return f"inputs-{index:05d}.float32"


def _exact_name(index: int) -> str:
    """What enters block `index` of the float model; at the first block the same file as the quantized model's."""
    return f"exact-{index:05d}.float32" if index else _inputs_name(0)


_MIDDLE = "middle.float32"
_FLOAT_SHARE = 0.1  # of a block's time goes to running it in float, roughly: one pass of six, and no solving


def _blocks_done(work: WorkFolder, config: Config) -> int:
    """Blocks from the first on that an earlier run finished: a block's rows are written last."""
    blocks = range(config.num_hidden_layers)
    return next((index for index in blocks if not (work / _rows_name(index)).exists()), len(blocks))


def _read_rows(path: Path) -> list[LayerReport]:
    return [LayerReport(**row) for row in read_json(path)["layers"]]


def _all_rows(work: WorkFolder, config: Config) -> list[LayerReport]:
    return [row for index in range(config.num_hidden_layers) for row in _read_rows(work / _rows_name(index))]


class _Walk:
    """Quantizes one block after another, each on the outputs of the quantized ones before it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        work: WorkFolder,
        workload: Workload,
        samples: Sequence[Sample] | None,
        progress: Progress,
    ):
        self.checkpoint, self.work, self.samples, self.progress = checkpoint, work, samples, progress
        self.config, self.quant, self.lengths = workload.config, workload.quant, workload.lengths
        self.device, self.method = workload.device, workload.method
        self.blocks = self.config.num_hidden_layers

    def run(self, start: int) -> None:
        """From block `start` to the last shard."""
        for index in range(start):
            for row in _read_rows(self.work / _rows_name(index)):
                self.progress(Event((index + 1) / self.blocks, "already done, resuming", row, resumed=True))
        for index in range(start, self.blocks):
            self._block(index)
        self.progress(Event(1.0, "writing embeddings and head"))
        write_outer(self.work, self.checkpoint)

    def _block(self, index: int) -> None:
        """Quantize block `index`, write what enters the next one, and its shard. Rows, written last, mark it done."""
        tick = self._tick(index)
        inputs = None if self.samples is None else self._inputs(index)
        block = load_block(self.checkpoint, index, self.device)
        if inputs is None:
            quantized, rows = round_block(block, index, self.quant, tick)
        else:
            streams = None
            if self.method.follow:
                streams = self._streams(block, index, self._tick(index, end=_FLOAT_SHARE))
                tick = self._tick(index, begin=_FLOAT_SHARE)
            quantized, rows = quantize_block(
                block, self.config, index, inputs, self.quant, self.device, tick, streams=streams, method=self.method
            )
            (self.work / _MIDDLE).unlink(missing_ok=True)  # before another file of its size
            if index + 1 < self.blocks:
                with self._writing(_inputs_name(index + 1)) as put:
                    for number, output in enumerate(run_block(block, self.config, index, inputs, self.device, tick)):
                        put(number, 0, output)
        tensors = block_tensors(block, self.checkpoint, index, quantized, self.quant)
        write_tensors(self.work / shard_name(index, self.blocks), tensors)
        write_json(self.work / _rows_name(index), {"layers": [asdict(row) for row in rows]})
        for name in (_inputs_name(index), _exact_name(index)):
            (self.work / name).unlink(missing_ok=True)
        for row in rows:
            self.progress(Event((index + 1) / self.blocks, f"block {index + 1}/{self.blocks}", row))

    def _tick(self, index: int, begin: float = 0.0, end: float = 1.0) -> Tick:
        """Progress within block `index`, of a stage that takes its time from the share `begin` to `end`."""

        def tick(share: float, text: str) -> None:
            done = (index + begin + (end - begin) * share) / self.blocks
            self.progress(Event(done, f"block {index + 1}/{self.blocks}: {text}"))

        return tick

    def _inputs(self, index: int) -> Activations:
        """What enters block `index`: in the work folder already, or computed from the samples."""
        if index == 0 and not (self.work / _inputs_name(0)).exists():

            def say(text: str) -> None:
                self.progress(Event(0.0, text))

            with self._writing(_inputs_name(0)) as put:
                embed_samples(self.checkpoint, self.samples or (), put, device=self.device, say=say)
        return self._written(_inputs_name(index))

    def _streams(self, block: QWenBlock, index: int, tick: Tick) -> Streams:
        """Run the block while it is float, and write the float model's stream inside it and after it."""
        before = self._written(_exact_name(index))
        with self._writing(_MIDDLE) as put_middle, self._writing(_exact_name(index + 1)) as put_after:
            streams = run_float(block, self.config, index, before, self.device, tick)
            for number, (middle, after) in enumerate(streams):
                put_middle(number, 0, middle)
                put_after(number, 0, after)
        return Streams(before, self._written(_MIDDLE), self._written(_exact_name(index + 1)))

    def _written(self, name: str) -> Activations:
        if not (self.work / name).exists():
            raise BundleError(
                f"{self.work / name} is missing, so the run cannot resume; add --overwrite to start again"
            )
        return Activations(self.work / name, self.lengths, self.config.hidden_size)

    def _writing(self, name: str) -> AbstractContextManager[Put]:
        return writing(self.work / name, self.lengths, self.config.hidden_size)
