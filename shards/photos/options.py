"""The options of packing, with their defaults and units."""

from dataclasses import dataclass, field

from shards.storage.errors import BadInput

NO_EFFECT_ON_RESULT = {"how": True}
"""Field metadata: the option changes how the work is done, never its result."""


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How a catalogue becomes a shard set."""

    size: int = 384
    """Pixels of the short side that photos are reduced to; never enlarged."""
    quality: int = 92
    """JPEG quality of the stored photos (1 to 95)."""
    keep: bool = False
    """Store the original bytes of JPEG photos instead of re-encoding."""
    max_pixels: int = 64_000_000
    """A photo with more pixels is refused before it is decoded."""
    max_title: int = 4_096
    """Characters; a longer title is cut, counted and reported."""
    shard_items: int = 5_000
    """At most so many items in one tar."""
    seed: int = 0
    """Of the order of the items in the tars."""
    workers: int = field(default=1, metadata=NO_EFFECT_ON_RESULT)
    """Processes that build shards."""

    def __post_init__(self) -> None:
        for name in ("size", "max_pixels", "max_title", "shard_items", "workers"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name}: {getattr(self, name)}, must be at least 1")
        if not 1 <= self.quality <= 95:
            raise BadInput(f"quality: {self.quality}, must be 1 to 95")
