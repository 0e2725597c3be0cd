"""The options of packing, with their units and defaults."""

from dataclasses import dataclass, field

from shards.storage.errors import BadInput

NO_EFFECT_ON_RESULT = {"how": True}
"""Field metadata: the option changes how the work is done, never its result."""


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Options of packing: how a catalogue becomes a shard set."""

    size: int = 384
    """Pixels of the short side to which larger photos are reduced. Use --encoder.image-size or
    more: more leaves room for random crops and larger models."""
    quality: int = 92
    """JPEG quality of the stored photos, 1 to 95. Less saves disk and loses detail."""
    keep: bool = False
    """Store JPEG photos with their original bytes, without --size and --quality; other photos are
    encoded as JPEG all the same. Packs faster, needs more disk."""
    max_pixels: int = 64_000_000
    """Largest width times height of a photo. A larger one is left out as if it were broken (its
    posting keeps the title), which bounds memory."""
    max_title: int = 4_096
    """Largest number of characters of a title; longer ones are cut, with a remark in items.parquet.
    The text encoder reads only --encoder.max-length tokens."""
    shard_items: int = 5_000
    """Largest number of items in one tar file. Each split should have more files than you have
    workers."""
    seed: int = 0
    """Random seed of the order of the items in the tar files. The split does not depend on it."""
    workers: int = field(default=1, metadata=NO_EFFECT_ON_RESULT)
    """Processes that prepare photos and write tar files."""

    def __post_init__(self) -> None:
        for name in ("size", "max_pixels", "max_title", "shard_items", "workers"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name}: {getattr(self, name)}, must be at least 1")
        if not 1 <= self.quality <= 95:
            raise BadInput(f"quality: {self.quality}, must be 1 to 95")
