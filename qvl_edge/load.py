"""From a name or a folder to the parts of a Runtime: what is checked, planned and read, in this order."""

import time
import warnings
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch

from kernels.sessions import set_threads
from qvl_edge.bundle import Bundle, is_bundle
from qvl_edge.checkpoint import VISUAL, Checkpoint, raw_reason
from qvl_edge.config import Config
from qvl_edge.engine.budget import Plan, choose, estimate
from qvl_edge.engine.device import check_cpu, check_dtype, find_device, is_turing, named_with_others
from qvl_edge.errors import ConfigError
from qvl_edge.hub import local_folder
from qvl_edge.lora import LoraCheckpoint
from qvl_edge.memory import free_memory, parse_bytes, return_buffers
from qvl_edge.model.decoder import QWenLMHeadModel
from qvl_edge.model.fused import FusedDecoder
from qvl_edge.model.loading import check_tensors, load_decoder, load_fused
from qvl_edge.options import LoadOptions
from qvl_edge.text.tokenizer import Tokenizer
from qvl_edge.vision.encoder import VisionEncoder
from qvl_edge.vision.openvino import NAME as OPENVINO
from qvl_edge.vision.openvino import check_openvino
from qvl_edge.vision.rgb import check_background
from qvl_edge.vit_cache import Progress, exported_vit

_SHOWN = 500_000_000  # bytes from which on loading shows its progress
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """The parts of a Runtime. generation: the model's generation_config.json, as it was asked for."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    generation: dict[str, Any]
    plan: Plan
    decoder: QWenLMHeadModel | FusedDecoder
    encoder: VisionEncoder


def load(path: str | PathLike[str], asked: LoadOptions, progress: Progress | None) -> Loaded:
    """What `Runtime.from_pretrained` says; its errors too."""
    say = progress or (lambda _: None)
    check_background(asked.background)
    place = find_device(asked.device)
    check_dtype(place, asked.dtype)
    asked.activations_on(str(place))  # what it refuses is refused before a download
    try:
        set_threads(asked.threads)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if place.type == "cpu":
        return_buffers()
    encoding = place
    if asked.vision_device == OPENVINO:
        check_openvino()
        encoding = torch.device("cpu")
    elif asked.vision_device is not None:
        encoding = find_device(asked.vision_device, option="vision_device", kernels=False)
    folder = local_folder(
        path,
        source=asked.source,
        revision=asked.revision,
        local_files_only=asked.local_files_only,
        progress=progress,
    )
    bundle = Bundle.open(folder, verify=asked.verify) if is_bundle(folder) else None
    if asked.lora is not None:
        adapter = local_folder(asked.lora, source=asked.source, local_files_only=asked.local_files_only)
        checkpoint: Checkpoint = LoraCheckpoint(folder, adapter)  # refuses a bundle
    else:
        checkpoint = bundle.checkpoint if bundle else Checkpoint(folder)
    generation = checkpoint.generation | ({"chat_format": asked.chat_format} if asked.chat_format else {})
    if asked.chat_format is None and (reason := raw_reason(folder)):
        if checkpoint.generation.get("chat_format"):  # a base model, as far as can be known
            say(reason)
        else:
            warnings.warn(reason, stacklevel=3)
    check_tensors(checkpoint, visual=bundle is None)  # both halves, before either is worked on
    tokenizer = Tokenizer.from_folder(checkpoint.path, checkpoint.config)
    plan = plan_for(checkpoint.config, asked, place, encoding, bundle.vit_dtype if bundle else None, say)
    quant = checkpoint.config.quantization
    if place.type == "cpu" and (plan.head == "int8" or (quant is not None and quant.bits == 4)):
        check_cpu()
    vit = (
        bundle.vit if bundle else exported_vit(checkpoint, dtype=plan.vit, cache_dir=asked.cache_dir, progress=progress)
    )
    decoder = _decoder(checkpoint, plan, place, say)
    visual = checkpoint.config.visual
    encoder = VisionEncoder(
        vit,
        visual,
        device=OPENVINO if asked.vision_device == OPENVINO else str(encoding),
        max_batch=plan.images,
        release=asked.release_vision,
    )
    return Loaded(checkpoint, tokenizer, generation, plan, decoder, encoder)


def plan_for(
    config: Config,
    asked: LoadOptions,
    place: torch.device,
    encoding: torch.device,
    vit: str | None,
    say: Progress,
) -> Plan:
    """How the model is to run. vit: dtype of a bundle's vision tower. FitError if it does not fit."""
    if asked.max_context is not None and asked.max_context > config.max_position_embeddings:
        raise ConfigError(
            f"max_context is {asked.max_context}, this model takes 1 to {config.max_position_embeddings} positions"
        )
    memory = parse_bytes(asked.max_memory) if asked.max_memory is not None else free_memory(place)
    dtype = asked.dtype or ("float32" if place.type == "cpu" else "float16")
    profile, plan = choose(
        config,
        Plan(
            device=place.type,
            dtype=DTYPES[dtype],
            activations=asked.activations_on(str(place)),
            embeddings=asked.embeddings,
            slots=asked.slots,
            turing=is_turing(place),
            vision="elsewhere" if encoding != place else "released" if asked.release_vision else "resident",
            openvino=asked.vision_device == OPENVINO,
        ),
        profile=asked.profile,
        memory=memory,
        where=named_with_others(place),
        vit=vit,
        head=asked.head,
        kv_cache=asked.kv_cache,
        context=asked.max_context,
    )
    total = estimate(config, plan).total
    say(
        f"{profile}: vision tower {plan.vit}, head {plan.precision('head')}, cache {plan.precision('kv_cache')}, "
        f"{plan.activations} activations, {plan.context} positions; "
        f"{total / 1e9:.2f} GB" + (f" of the {memory / 1e9:.2f} GB free on {place}" if memory is not None else "")
    )
    return plan


def _decoder(checkpoint: Checkpoint, plan: Plan, place: torch.device, say: Progress) -> QWenLMHeadModel | FusedDecoder:
    """The decoder, with a line for every tenth of it that was read, and the rate."""
    quant = checkpoint.config.quantization
    fused = place.type == "cuda" and quant is not None and quant.bits == 4
    load = load_fused if fused else load_decoder
    total = sum(checkpoint.nbytes(name) for name in checkpoint.names if not name.startswith(VISUAL))
    began, done, shown = time.perf_counter(), 0, 0

    def count(nbytes: int) -> None:
        nonlocal done, shown
        done += nbytes
        if total > _SHOWN and done * 10 // total > shown:
            shown = done * 10 // total
            say(f"read {done / 1e9:.2f} of {total / 1e9:.2f} GB")

    how: dict[str, Any] = {"dtype": plan.dtype, "device": place, "head": plan.head, "embeddings": plan.embeddings}
    if place.type == "cpu":
        how["activations"] = plan.activations
    decoder = load(checkpoint, **how, on_bytes=count)
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    seconds = time.perf_counter() - began
    say(f"read {done / 1e9:.2f} GB in {seconds:.1f} s, {done / seconds / 1e9:.2f} GB/s")
    return decoder
