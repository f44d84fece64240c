"""The model's settings as published in config.json and quantize_config.json: frozen, upstream field names, checked."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qvl_edge.errors import ConfigError
from qvl_edge.files import read_json

HEAD_DIM = 128  # resampler heads are output_dim // 128 (Qwen-VL visual.py)
QUERY_GRID = 16  # the resampler's queries and both position tables are 16 x 16 (Qwen-VL visual.py)
IMAGE_TOKENS = QUERY_GRID * QUERY_GRID
# far above what a model has, and what would take for ever, or overflow, before its weights show that it is not so
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "layers", "mlp_ratio"), 1 << 10),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "seq_length", "rotary_emb_base"), 1 << 30),
    "image_size": 1 << 14,
}
_KINDS: dict[Any, str] = {int: "an integer", bool: "true or false", float: "a number"}

# of GPTQModel, and of transformers: other values change what the tensors are
_GPTQMODEL: dict[str, Any] = {
    "quant_method": "gptq",
    "lm_head": False,
    "pack_dtype": "int32",
    "dynamic": {},
    "is_marlin_format": False,
}


def _build(section: Mapping[str, Any], cls: type, where: str) -> Any:
    """`cls` from its fields in `section`; ConfigError for a value of another type, and for a field that is missing."""
    values = {}
    for field in fields(cls):
        value = section.get(field.name)
        if value is None:
            continue
        # mistyped numbers would otherwise surface as a shape error far from here
        kind = type(value)
        if field.type is float and kind is int:
            value, kind = float(value), float
        if field.type in _KINDS and kind is not field.type:
            raise ConfigError(f"{where}: {field.name} is {value!r}, expected {_KINDS[field.type]}")
        values[field.name] = value
    try:
        return cls(**values)
    except TypeError as error:  # dataclass: missing required arguments, with their names
        raise ConfigError(f"{where}: {str(error).split('() ', 1)[-1]}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _positive(owner: Any, *names: str) -> None:
    for name in names:
        value, most = getattr(owner, name), _MOST.get(name, 1 << 20)
        if not 0 < value <= most:  # nor is NaN
            raise ConfigError(f"{name} is {value}, expected more than 0 and at most {most}")


@dataclass(frozen=True)
class VisualConfig:
    """config.json:visual: the ViT (OpenCLIP bigG in the published model) and its resampler."""

    heads: int
    image_size: int  # pixels per side
    image_start_id: int  # token id of <img>; </img> and <imgpad> follow it
    layers: int
    mlp_ratio: float
    output_dim: int  # = hidden_size of the decoder
    patch_size: int  # pixels per side
    width: int

    def __post_init__(self) -> None:
        _positive(self, "heads", "image_size", "layers", "output_dim", "patch_size", "width", "mlp_ratio")
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.output_dim % HEAD_DIM:
            raise ConfigError(f"output_dim {self.output_dim} is not a multiple of {HEAD_DIM}")

    @property
    def mlp_width(self) -> int:
        """Hidden features of the ViT's MLP: int(width * mlp_ratio), 8192 in the published model."""
        return int(self.width * self.mlp_ratio)

    @property
    def patches(self) -> int:
        """Patches per image: (image_size / patch_size)²."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class QuantConfig:
    """quantize_config.json: how the decoder's projections were quantized (GPTQ, arXiv:2210.17323)."""

    bits: int = 4
    group_size: int = 128  # input channels that share one scale; -1: all of them
    damp_percent: float = 0.01  # share of the Hessian's mean diagonal added to it
    desc_act: bool = False  # quantize the input channels in the order of falling activation
    static_groups: bool = False  # scales fixed before the first column is quantized
    sym: bool = True  # zero point is the middle level
    true_sequential: bool = True  # within a block, later projections see the quantized earlier ones
    checkpoint_format: str = "gptq"  # "gptq" (v1): qzeros hold zero - 1; "gptq_v2": qzeros hold zero

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ConfigError(f"bits is {self.bits}, supported are 4 and 8")
        if self.group_size != -1 and (self.group_size <= 0 or self.group_size % 32):
            raise ConfigError(f"group_size is {self.group_size}, supported are -1 and multiples of 32")
        if not 0 < self.damp_percent < 1:
            raise ConfigError(f"damp_percent is {self.damp_percent}, expected a value in (0, 1)")
        if self.checkpoint_format not in ("gptq", "gptq_v2"):
            raise ConfigError(f"checkpoint_format is {self.checkpoint_format!r}, known are 'gptq' and 'gptq_v2'")

    @classmethod
    def from_dict(cls, section: Mapping[str, Any], where: str = "quantize_config.json") -> "QuantConfig":
        """Read a quantize_config.json or config.json:quantization_config of auto-gptq, GPTQModel or transformers.

        Their keys that say nothing about the tensors are ignored. ConfigError for those that say what is not supported.
        """
        if not isinstance(section, Mapping):
            raise ConfigError(f"{where} is {section!r}, expected an object")
        for name, supported in _GPTQMODEL.items():
            if section.get(name) not in (None, supported):
                raise ConfigError(f"{where}: {name} is {section[name]!r}, only {supported!r} is supported")
        checkpoint_format = section.get("checkpoint_format") or section.get("format")
        return _build({**section, "checkpoint_format": checkpoint_format}, cls, where)

    def to_dict(self) -> dict[str, Any]:
        """quantize_config.json in auto-gptq's names, so that auto-gptq and GPTQModel read it."""
        return {**asdict(self), "model_name_or_path": None, "model_file_base_name": "model", "quant_method": "gptq"}

    def groups(self, in_features: int) -> int:
        """Number of groups along `in_features` input channels."""
        if self.group_size == -1:
            return 1
        if in_features % self.group_size:
            raise ConfigError(f"group_size {self.group_size} does not divide {in_features} input features")
        return in_features // self.group_size


@dataclass(frozen=True)
class Config:
    """config.json of Qwen-VL, Qwen-VL-Chat or Qwen-VL-Chat-Int4."""

    hidden_size: int
    intermediate_size: int  # w1 and w2 have half of it each
    kv_channels: int  # head size
    num_attention_heads: int
    num_hidden_layers: int
    vocab_size: int
    visual: VisualConfig
    layer_norm_epsilon: float = 1e-6
    max_position_embeddings: int = 8192
    no_bias: bool = True
    rotary_emb_base: float = 10000.0
    seq_length: int = 2048  # positions seen in training: NTK and log-n scaling begin past it
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    torch_dtype: str = "float16"
    quantization: QuantConfig | None = None

    def __post_init__(self) -> None:
        _positive(self, "hidden_size", "intermediate_size", "kv_channels", "num_attention_heads")
        _positive(self, "num_hidden_layers", "vocab_size", "seq_length", "max_position_embeddings")
        _positive(self, "layer_norm_epsilon", "rotary_emb_base")
        if self.kv_channels % 2:
            raise ConfigError(f"kv_channels is {self.kv_channels}, expected an even number: channels turn in pairs")
        if self.num_attention_heads * self.kv_channels != self.hidden_size:
            raise ConfigError(
                f"{self.num_attention_heads} heads of {self.kv_channels} channels make "
                f"{self.num_attention_heads * self.kv_channels}, but hidden_size is {self.hidden_size}"
            )
        if self.intermediate_size % 2:
            raise ConfigError(f"intermediate_size {self.intermediate_size} is odd; w1 and w2 take half of it each")
        if self.visual.output_dim != self.hidden_size:
            raise ConfigError(f"visual.output_dim {self.visual.output_dim} differs from hidden_size {self.hidden_size}")
        if not 0 <= self.visual.image_start_id < self.vocab_size - 2:
            raise ConfigError(
                f"visual.image_start_id {self.visual.image_start_id} leaves no room for </img> and <imgpad> "
                f"below vocab_size {self.vocab_size}"
            )
        if self.torch_dtype not in ("float16", "bfloat16", "float32"):
            raise ConfigError(f"torch_dtype is {self.torch_dtype!r}, known are float16, bfloat16, float32")

    @property
    def ffn_size(self) -> int:
        """Features of w1, w2 and of c_proj's input: intermediate_size / 2 (11008 in the published model)."""
        return self.intermediate_size // 2

    @classmethod
    def from_dict(cls, section: Mapping[str, Any], quantization: Mapping[str, Any] | None = None) -> "Config":
        """Build from a parsed config.json and, where the checkpoint has one, a parsed quantize_config.json."""
        if section.get("model_type") != "qwen" or not isinstance(section.get("visual"), Mapping):
            raise ConfigError(
                f"config.json: model_type is {section.get('model_type')!r}"
                f"{'' if isinstance(section.get('visual'), Mapping) else ' and there is no visual section'}; "
                "this package runs Qwen-VL and Qwen-VL-Chat (model_type 'qwen' with a visual section)"
            )
        for name, expected in (("rotary_pct", 1.0), ("scale_attn_weights", True), ("tie_word_embeddings", False)):
            if section.get(name, expected) != expected:
                raise ConfigError(f"config.json: {name} is {section[name]!r}; Qwen-VL has {expected!r}")
        visual = _build(section["visual"], VisualConfig, "config.json:visual")
        where, inner = "config.json:quantization_config", section.get("quantization_config")
        quant = None if inner is None else QuantConfig.from_dict(inner, where)
        if quantization is not None:
            own = {} if inner is None else inner
            outer = QuantConfig.from_dict({**own, **quantization})
            for name in ("bits", "group_size", "checkpoint_format"):  # no shape shows the last
                a, b = getattr(outer, name), getattr(quant, name, None)
                if name in own and a != b:
                    raise ConfigError(
                        f"quantize_config.json: {name} is {a!r}, {where} has {b!r}; one is of another model"
                    )
            quant = outer
        # transformers 5 writes "dtype"
        dtype = section.get("torch_dtype") or section.get("dtype")
        return _build({**section, "torch_dtype": dtype, "visual": visual, "quantization": quant}, cls, "config.json")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Config":
        """Read config.json and, if there, quantize_config.json of a checkpoint or bundle."""
        folder = Path(folder)
        section = read_json(folder / "config.json")
        quantize = folder / "quantize_config.json"
        return cls.from_dict(section, read_json(quantize) if os.path.lexists(quantize) else None)
