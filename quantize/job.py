"""A float checkpoint -> the int4 decoder of a bundle, block by block, resumable."""

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantize.activations import Activations, Put, activation_bytes, writing
from quantize.blocks import Streams, block_tensors, load_block, quantize_block, round_block, run_block, run_float
from quantize.calibration import embed_samples
from quantize.estimate import Job, check_memory, duration, seconds, size
from quantize.layout import REPORT, check_source, decoder_bytes, int4_config, shard_name, write_outer, write_settings
from quantize.progress import Event, LayerReport, Progress, Tick, ignore
from quantize.solver import FULL, Method
from quantize.work import WorkFolder, held_bytes, open_work
from qvl_edge.checkpoint import Checkpoint
from qvl_edge.config import Config, QuantConfig
from qvl_edge.errors import BundleError, CalibrationError, ConfigError
from qvl_edge.files import read_json, write_json, write_tensors
from qvl_edge.model.decoder import QWenBlock
from qvl_edge.model.loading import check_tensors
from qvl_edge.text.conversations import Sample, digest_of


@dataclass(frozen=True)
class Result:
    """What a run did."""

    layers: list[LayerReport]  # of the whole decoder, also what an earlier run finished; empty for a copied one
    already_done: bool = False  # the bundle was finished with these settings
    resumed_blocks: int = 0  # blocks that an earlier run had finished


def default_device() -> str:
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """ConfigError if `device` is not usable here."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}, known are 'cpu' and 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no CUDA GPU here; use --device cpu, which is slower")


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

    Stopped at any moment, the same call goes on from the last finished block and ends in the same bytes.
    method: what is done beyond GPTQ as published.
    ConfigError, CheckpointError, CalibrationError or BundleError say what stands in the way, before anything is written
    where that can be known.
    """
    check_device(device)
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
    check_tensors(checkpoint, visual=False)
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
        "device": device,  # another one rounds differently in the last bits
    }
    job = Job(
        config,
        quant,
        [len(sample.ids) for sample in samples or ()],
        len({key for sample in samples or () for key in sample.image_keys}),
        on_cuda=device != "cpu",
        method=method,
    )
    with open_work(folder, checkpoint.path, settings, overwrite=overwrite) as work:
        if work is None:
            return Result(_read_rows(folder / REPORT), already_done=True)
        resumed = _blocks_done(work, config)
        if work.is_ready:
            layers = _all_rows(work, config)
            work.publish()
            return Result(layers, resumed_blocks=resumed)
        _check(job, checkpoint, folder, quantized_config, device, progress)
        work.begin()
        with torch.inference_mode():
            _Walk(checkpoint, work, quant, samples, device, progress, method).run(resumed)
        layers = _all_rows(work, config)
        report = {
            "method": settings["method"],
            "error": "relative squared error of the weights" if samples is None else "of the outputs on the samples",
            "calibration": calibration,
            "layers": [layer.to_dict() for layer in layers],
        }
        work.publish(write_settings(work, checkpoint, quant, report))
    return Result(layers, resumed_blocks=resumed)


def _check(job: Job, checkpoint: Checkpoint, folder: Path, quantized: Config, device: str, progress: Progress) -> None:
    """Say what the job will take. BundleError or ConfigError if the disk or a memory is too small for it."""
    decoder = decoder_bytes(checkpoint, quantized)
    # what enters a block and the next one, side by side, and the same of the float model
    inputs = (4 if job.method.follow else 2) * activation_bytes(job.lengths, job.config.hidden_size)
    check_memory(job, device)
    needed, free = decoder + inputs - held_bytes(folder), shutil.disk_usage(folder).free
    if free < needed:
        smaller = f"; --samples and --seqlen make the {size(inputs)} for calibration less" if inputs else ""
        raise BundleError(
            f"{folder} needs {size(needed)} and its disk has {size(free)} free; free some space, or choose a folder on "
            f"another disk{smaller}"
        )
    takes, rate = seconds(job, device)
    memory = f"{size(job.host_bytes)} of memory" + (f", {size(job.device_bytes)} on the GPU" if job.on_cuda else "")
    disk = f"{size(decoder + inputs)} of disk, of which {size(decoder)} stay"
    time = f"about {duration(takes)} at the {rate / 1e9:.0f} GFLOP/s just measured"
    progress(Event(0.0, f"estimate: {memory}; {disk}; {time}", lasting=True))


def _rows_name(index: int) -> str:
    return f"rows-{index:05d}.json"


def _inputs_name(index: int) -> str:
    return f"inputs-{index:05d}.float32"


def _exact_name(index: int) -> str:
    """What enters block `index` of the float model; the same as of the other one at the first block."""
    return f"exact-{index:05d}.float32" if index else _inputs_name(0)


_MIDDLE = "middle.float32"
_FLOAT_SHARE = 0.1  # of a block's time goes to running it in float, roughly: one pass of six, and no solving


def _later(tick: Tick) -> Tick:
    """`tick` for what comes after that."""
    return lambda share, text: tick(_FLOAT_SHARE + (1 - _FLOAT_SHARE) * share, text)


def _blocks_done(work: WorkFolder, config: Config) -> int:
    """Blocks in a row that an earlier run finished: a block's rows are written last."""
    for index in range(config.num_hidden_layers):
        if not (work / _rows_name(index)).exists():
            return index
    return config.num_hidden_layers


def _read_rows(path: Path) -> list[LayerReport]:
    return [LayerReport(**row) for row in read_json(path)["layers"]]


def _all_rows(work: WorkFolder, config: Config) -> list[LayerReport]:
    return [row for index in range(config.num_hidden_layers) for row in _read_rows(work / _rows_name(index))]


class _Walk:
    """The way through the blocks."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        work: WorkFolder,
        quant: QuantConfig,
        samples: Sequence[Sample] | None,
        device: str,
        progress: Progress,
        method: Method,
    ):
        self.checkpoint, self.work, self.quant = checkpoint, work, quant
        self.samples, self.device, self.progress, self.method = samples, device, progress, method
        self.config = checkpoint.config
        self.blocks = self.config.num_hidden_layers
        self.lengths = [len(sample.ids) for sample in samples or ()]

    def run(self, start: int) -> None:
        """From block `start` to the last shard."""
        for index in range(start):
            for row in _read_rows(self.work / _rows_name(index)):
                self.progress(Event((index + 1) / self.blocks, "finished by an earlier run", row))
        for index in range(start, self.blocks):
            self._block(index)
        self.progress(Event(1.0, "writing embeddings and head"))
        write_outer(self.work, self.checkpoint)

    def _inputs(self, index: int) -> Activations:
        """What enters block `index`: in the work folder already, or made of the samples."""
        if index == 0 and not (self.work / _inputs_name(0)).exists():
            with self._writing(_inputs_name(0)) as put:
                embed_samples(
                    self.checkpoint,
                    self.samples or (),
                    put,
                    device=self.device,
                    tick=lambda _, text: self.progress(Event(0.0, text)),
                )
        return self._written(_inputs_name(index))

    def _tick(self, index: int) -> Tick:
        def tick(share: float, text: str) -> None:
            self.progress(Event((index + share) / self.blocks, f"block {index + 1}/{self.blocks}: {text}"))

        return tick

    def _written(self, name: str) -> Activations:
        if not (self.work / name).exists():
            raise BundleError(f"{self.work / name} is missing, so the run cannot go on; add --overwrite to start again")
        return Activations(self.work / name, self.lengths, self.config.hidden_size)

    def _writing(self, name: str) -> AbstractContextManager[Put]:
        return writing(self.work / name, self.lengths, self.config.hidden_size)

    def _streams(self, block: QWenBlock, index: int, tick: Tick) -> Streams:
        """Run the block while it is float, and write the float model's stream inside it and after it."""
        before = self._written(_exact_name(index))
        with self._writing(_MIDDLE) as put_middle, self._writing(_exact_name(index + 1)) as put_after:
            streams = run_float(block, self.config, index, before, self.device, tick)
            for number, (middle, after) in enumerate(streams):
                put_middle(number, 0, middle)
                put_after(number, 0, after)
        return Streams(before, self._written(_MIDDLE), self._written(_exact_name(index + 1)))

    def _block(self, index: int) -> None:
        """Quantize block `index`, write what enters the next one, and its shard. Rows, written last, say it is done."""
        tick = self._tick(index)
        inputs = None if self.samples is None else self._inputs(index)
        block = load_block(self.checkpoint, index, self.device)
        if inputs is None:
            quantized, rows = round_block(block, index, self.quant, tick)
        else:
            streams = None
            if self.method.follow:
                streams = self._streams(block, index, lambda share, text: tick(share * _FLOAT_SHARE, text))
                tick = _later(tick)
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
        write_json(self.work / _rows_name(index), {"layers": [row.to_dict() for row in rows]})
        for name in (_inputs_name(index), _exact_name(index)):
            (self.work / name).unlink(missing_ok=True)
        for row in rows:
            self.progress(Event((index + 1) / self.blocks, f"block {index + 1}/{self.blocks}", row))
