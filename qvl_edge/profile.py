"""How a model is kept in memory: the choices that there are, and the profiles that name a set of them."""

from dataclasses import dataclass
from typing import Literal

Head = Literal["float16", "int8"]
"""lm_head: in the model's dtype, or weight-only int8."""
KVType = Literal["float16", "int8"]
"""Keys and values: in the model's dtype, or int8 with a scale a token and head."""
Embeddings = Literal["host", "device"]
"""The embedding table: read from the mapped file (8 KiB a token of Qwen-7B), or with the rest of the model."""
Vision = Literal["resident", "released", "elsewhere"]
"""The vision tower: stays in memory, is there only while images are encoded, or is on another device."""


@dataclass(frozen=True)
class Profile:
    """How exactly the parts beside the decoder's layers are kept. vit: dtype of the exported vision tower."""

    vit: str
    head: Head
    kv_cache: KVType


# from nothing given up beyond int4 to most
PROFILES = {
    "12g": Profile("float16", "float16", "float16"),
    "8g": Profile("int8", "int8", "int8"),
    "6g": Profile("int4", "int8", "int8"),
}
