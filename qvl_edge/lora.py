"""A checkpoint with a LoRA adapter merged into it, tensor by tensor, as it is read.

The adapter is a folder that PEFT wrote (Qwen-VL's finetune.py --use_lora and ms-swift do): adapter_config.json, and
adapter_model.safetensors or .bin with tensors named base_model.model.NAME, where NAME is
    transformer.h.0.attn.c_attn.lora_A.weight  A (r, in), and lora_B.weight  B (out, r):  W + scale * B @ A
    transformer.wte.lora_embedding_A           A (r, rows), and lora_embedding_B  B (columns, r):  W + scale * (B @ A).T
    transformer.wte.weight                     a whole tensor, trained along (modules_to_save), in place of the base's
with scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. Names as the model in memory has them, with the
adapter's own in them (lora_A.default.weight), are taken too. Source: PEFT 0.11, tuners/lora/layer.py and
utils/save_and_load.py.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor

from qvl_edge.checkpoint import ADAPTER_CONFIG, ADAPTER_FILES, Checkpoint
from qvl_edge.errors import CheckpointError, ConfigError
from qvl_edge.files import read_json
from qvl_edge.memory import forget_pages
from qvl_edge.shards import ZERO3, Shard, open_shard, published_name

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# options under which A and B are more, or something else, than a sum of W and their product
_OTHER_KINDS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)
_INIT = (True, False, None, "gaussian", "eva", "orthogonal")  # others (PiSSA, OLoRA, …) change the base's weights

_MERGE = "Merge the adapter with PEFT (merge_and_unload), and give the merged checkpoint"
_MAX_PATTERN = 10_000  # characters; 400,000 took 20 s to compile
_PATTERN_S = 1  # for one name; a plain pattern takes microseconds
_OWN_NAME = re.compile(r"(\.lora_[AB])\.[^.]+(?=\.weight$)")  # .lora_A.default.weight
_EMBEDDING = re.compile(r"\.lora_embedding_([AB])(\.[^.]+)?$")
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.[^.]+)?)(?=\.(weight|bias)$)")


def _matches(pattern: str, module: str) -> bool:
    """re.fullmatch as PEFT does it, but an adapter's pattern may neither hang nor end in a traceback."""
    if len(pattern) > _MAX_PATTERN:
        raise ConfigError(
            f"{ADAPTER_CONFIG}: a pattern has {len(pattern)} characters, at most {_MAX_PATTERN}. {_MERGE}"
        )
    try:
        return regex.fullmatch(pattern, module, timeout=_PATTERN_S) is not None
    except TimeoutError:
        problem = f"takes more than {_PATTERN_S} s on {module}"
    except (regex.error, RecursionError) as error:
        problem = f"is no regular expression: {error}"
    raise ConfigError(f"{ADAPTER_CONFIG}: the pattern {pattern[:80]!r} {problem}. {_MERGE}")


class LoraCheckpoint(Checkpoint):
    """The float checkpoint at `path` with the adapter in the folder `adapter`.

    Opening reads headers only. ConfigError for an adapter of another kind than LoRA and for a quantized base,
    CheckpointError for an adapter that was made for another model, or is not complete.
    """

    def __init__(self, path: str | Path, adapter: str | Path):
        super().__init__(path)
        self.adapter = Path(adapter)
        if self.config.quantization is not None:
            raise ConfigError(
                f"{self.path} is quantized, and a LoRA cannot be merged into packed levels; give the float checkpoint "
                "that it was quantized from"
            )
        inner = sorted(file.parent.name for file in self.adapter.glob(f"*/{ADAPTER_CONFIG}"))
        if inner and not (self.adapter / ADAPTER_CONFIG).exists():  # a trainer's output, with one for each checkpoint
            raise ConfigError(
                f"{self.adapter / ADAPTER_CONFIG} is missing; there are adapters below it, give one of "
                f"{', '.join(inner)}"
            )
        settings = read_json(self.adapter / ADAPTER_CONFIG)
        _check_kind(settings, self.adapter / ADAPTER_CONFIG)
        self._adapter = _open_adapter(self.adapter)
        self._keys = {_name(key): key for key in self._adapter.names() if ".original_module." not in key}
        self._scales: dict[str, float] = {}  # by name of the base's tensor
        self._whole: set[str] = set()  # names of tensors that replace a base's
        for name in sorted(self._keys):
            self._match(name, settings)
        self._check_complete(settings)

    def _match(self, name: str, settings: Mapping[str, Any]) -> None:
        """Match one of the adapter's tensors to the base's. CheckpointError if there is none, or its shape differs."""
        where, key = self._adapter.path, self._keys[name]
        if self._adapter.shape(key) == (0,):
            raise CheckpointError(f"{where}: {key} is empty. {ZERO3}")
        if name.endswith(".lora_magnitude_vector"):
            raise ConfigError(f"{where} has {key}: it is a DoRA adapter. {_MERGE}")
        module = name.removesuffix(_A).removesuffix(_B)
        target = name if module == name else f"{module}.weight"
        if target not in self or _PREFIX not in key:
            raise CheckpointError(
                f"{where} has {key}, and {self.path} has no tensor {target} that it could belong to; the adapter was "
                "made for another model, or is not a plain LoRA"
            )
        expected = self.shape(target)
        if module == name:
            self._whole.add(target)
            if (found := self._adapter.shape(key)) != expected:
                raise CheckpointError(
                    f"{where}: {key} is {found}, and {target} of {self.path} is {expected}; the adapter was made for "
                    "another model"
                )
            return
        if missing := {f"{module}{part}" for part in (_A, _B)} - self._keys.keys():
            raise CheckpointError(f"{where} has {key} and not {missing.pop()}; copy the adapter again")
        a, b = (self._adapter.shape(self._keys[f"{module}{part}"]) for part in (_A, _B))
        rank, self._scales[target] = _rank_and_scale(module, settings)
        n_in, n_out = expected if _EMBEDDING.search(key) else expected[::-1]
        if len(expected) != 2 or a != (rank, n_in) or b != (n_out, rank):
            raise CheckpointError(
                f"{where}: {module} has A {a} and B {b} with rank {rank}, and {target} of {self.path} is {expected}; "
                "the adapter was made for another model"
            )

    def _check_complete(self, settings: Mapping[str, Any]) -> None:
        """CheckpointError if tensors that the adapter's settings name are not in its file."""
        modules = [name.removesuffix(".weight") for name in self.names if name.endswith(".weight")]
        products = [m for m in modules if len(self.shape(f"{m}.weight")) == 2]
        if isinstance(settings.get("target_modules"), str):  # ms-swift's pattern matches wte, which it never trains
            products = [module for module in products if not module.endswith("wte")]

        def chosen(modules: list[str], spec: Any) -> list[str]:
            """Names of the weights that a pattern, or a list of ends of names, stands for."""
            if isinstance(spec, str):
                return [f"{module}.weight" for module in modules if _matches(spec, module)]
            ends = tuple(f".{end}" for end in spec or ())
            return [f"{module}.weight" for module in modules if f".{module}".endswith(ends)]

        targets = settings.get("target_modules")
        if targets == "all-linear" or settings.get("layers_to_transform") not in (None, []):
            targets = None  # the names alone do not say which modules were meant
        excluded = chosen(products, settings.get("exclude_modules"))
        wanted = [name for name in chosen(products, targets) if name not in excluded]
        biases = [name.replace(".weight", ".bias") for name in self._scales]  # PEFT 0.11 loses those of "lora_only"
        for option, names, found in (
            ("target_modules", wanted, self._scales),
            ("modules_to_save", chosen(modules, settings.get("modules_to_save")), self._whole),
            ("bias", [] if settings.get("bias", "none") == "none" else [b for b in biases if b in self], self._whole),
        ):
            missing = [name for name in names if name not in found]
            if missing:
                raise CheckpointError(
                    f"{self._adapter.path} lacks {len(missing)} of the {len(names)} tensors that {option} in "
                    f"{ADAPTER_CONFIG} lists, such as that of {missing[0]}: they were not saved, or the copy is "
                    f"incomplete. To use the base's tensors instead, change {option}"
                )

    def __getitem__(self, name: str) -> Tensor:
        """The tensor `name` in the base's dtype, as the merged checkpoint would hold it; sums are in float32."""
        base = super().__getitem__(name)
        if name in self._whole:
            base = self._part(name).to(base.dtype)
        if name not in self._scales:
            return base
        module = name.removesuffix(".weight")
        a, b = (self._part(f"{module}{part}").float() for part in (_A, _B))
        if _EMBEDDING.search(self._keys[f"{module}{_A}"]):
            a, b = b.T, a.T
        merged = base.to(torch.float32, copy=True).addmm_(b, a, alpha=self._scales[name]).to(base.dtype)
        if not bool(torch.isfinite(merged).all()) and bool(torch.isfinite(base).all()):
            raise CheckpointError(
                f"{self._adapter.path} makes {name} exceed {torch.finfo(base.dtype).max:.6g}, where {base.dtype} "
                "ends; convert the base to float32, or train with a smaller learning rate"
            )
        return merged

    def _part(self, name: str) -> Tensor:
        """A tensor of the adapter. CheckpointError if it is not finite."""
        tensor = self._adapter.tensor(self._keys[name])
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{self._adapter.path}: {self._keys[name]} holds NaN or infinity, and the base does not: the training "
                "diverged; take an earlier checkpoint of the adapter"
            )
        return tensor

    def release(self, name: str) -> None:
        """Give back the pages of the base's tensor, and of the adapter's in its place."""
        super().release(name)
        if name in self._whole and self._adapter.mapped:
            forget_pages(self._adapter.tensor(self._keys[name]))

    def changes(self, prefix: str) -> bool:
        """Whether the adapter has anything for tensors whose names begin so."""
        return any(name.startswith(prefix) for name in self._keys)

    @cached_property
    def fingerprint(self) -> str:
        """The base's and the adapter's together: sha256 over the base's, each scale, and all of the adapter's bytes."""
        digest = hashlib.sha256(Checkpoint(self.path).fingerprint.encode())
        for name, key in sorted(self._keys.items()):
            tensor = self._adapter.tensor(key)
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        digest.update(repr(sorted(self._scales.items())).encode())
        return digest.hexdigest()


def open_checkpoint(path: str | Path, lora: str | Path | None) -> Checkpoint:
    """The checkpoint at `path`, with the adapter `lora` merged into it if there is one."""
    return Checkpoint(path) if lora is None else LoraCheckpoint(path, lora)


def _name(key: str) -> str:
    """The name of an adapter's tensor in the published model: NAME above."""
    named = _EMBEDDING.sub(r".lora_\1.weight", _OWN_NAME.sub(r"\1", published_name(key)))
    return _WRAPPED.sub("", named)


def _open_adapter(folder: Path) -> Shard:
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return open_shard(folder / name)
    raise CheckpointError(
        f"{folder} holds neither {ADAPTER_FILES[0]} nor {ADAPTER_FILES[1]}; is it an adapter's folder?"
    )


def _check_kind(settings: Mapping[str, Any], file: Path) -> None:
    """ConfigError if this is not a plain LoRA."""
    if settings.get("peft_type") != "LORA":
        raise ConfigError(f"{file}: peft_type is {settings.get('peft_type')!r}, only 'LORA' can be merged")
    other = next((option for option in _OTHER_KINDS if settings.get(option)), None)
    if other is None and settings.get("init_lora_weights", True) not in _INIT:
        other = "init_lora_weights"
    if other is not None:
        raise ConfigError(f"{file}: {other} is {settings[other]!r}, and only plain LoRA can be merged here. {_MERGE}")
    for option, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        given = settings.get(patterns) or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"{file}: {patterns} is {given!r:.80}, expected numbers by pattern")
        for value in (settings.get(option), *given.values()):
            # neither NaN nor too large for a float
            if type(value) not in (int, float) or not abs(value) < 1e9 or (option == "r" and value != int(value)):
                kind = "number, and a whole one" if option == "r" else "number"
                raise ConfigError(f"{file}: {option} is {value!r:.80}, expected a {kind}")
    for option in ("target_modules", "exclude_modules", "modules_to_save"):
        given = settings.get(option)
        if not isinstance(given, str | list | None) or not all(isinstance(name, str) for name in given or ()):
            raise ConfigError(f"{file}: {option} is {given!r:.80}, expected a pattern or a list of names")


def _rank_and_scale(module: str, settings: Mapping[str, Any]) -> tuple[int, float]:
    """r of a module and what its product B @ A is multiplied by; patterns are ends of names, as regular expressions."""

    def of(default: str, patterns: str) -> Any:
        for pattern, value in (settings.get(patterns) or {}).items():
            if _matches(rf"(.*\.)?({pattern})", module):
                return value
        return settings[default]

    rank, alpha = int(of("r", "rank_pattern")), float(of("lora_alpha", "alpha_pattern"))
    if rank < 1:
        raise ConfigError(f"{ADAPTER_CONFIG}: the rank of {module} is {rank}, expected at least 1")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
