"""How a server behaves."""

from dataclasses import dataclass

from qvl_edge import __version__
from qvl_edge.server.guard import Access
from qvl_edge.server.media import Media


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    messages: int = 256
    images: int = 16
    pixels: int = 256_000_000  # of its images in all, as they are stored
    n: int = 8
    prompts: int = 64  # of a text completion


@dataclass(frozen=True)
class Settings:
    """How a server behaves."""

    model: str  # the name in /v1/models, which requests must give
    max_model_len: int  # positions: the prompt and its answer
    access: Access
    aliases: tuple[str, ...] = ()  # more names of the model
    fingerprint: str = f"qvl-edge-{__version__}"  # system_fingerprint: what the same seed repeats an answer on
    limits: Limits = Limits()
    media: Media = Media()
    max_body_bytes: int = 32 << 20
    max_concurrent: int = 32  # requests that are being read, waiting or running
    share_cache: bool = False  # whether callers share the caches of prompts and pictures
    ping_s: float = 15.0  # a stream that is silent for so long gets a comment, so that no proxy closes it

    @property
    def body_memory(self) -> int:
        """Bytes of bodies that are in memory at once."""
        return 8 * self.max_body_bytes

    @property
    def names(self) -> tuple[str, ...]:
        """All names that requests may give."""
        return (self.model, *self.aliases)
