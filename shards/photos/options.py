"""The options of packing, with their units and defaults."""

from dataclasses import dataclass, field

from shards.storage.errors import BadInput

NO_EFFECT_ON_RESULT = {"how": True}
"""Field metadata: the option changes how the work is done, never its result."""


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Options of packing: how a catalogue becomes a shard set."""

    size: int = 384
    """Length in pixels to which the short side of a photo is reduced; smaller photos stay as they
    are. At least the image size of the encoder."""
    quality: int = 92
    """JPEG quality of the stored photos, 1 to 95. Less saves disk and loses detail."""
    keep: bool = False
    """Store JPEG photos with their original bytes instead of resizing and encoding them again."""
    max_pixels: int = 64_000_000
    """A photo with more pixels is refused before it is decoded, which bounds memory."""
    photos: bool = True
    """Pack the photos that the catalogue names. Without them its titles alone are packed."""
    follow_links: bool = False
    """Read photos that are links out of the folder of photos, as in stores of Hugging Face, DVC
    and git-annex. Anyone who can write there can then have any file of yours packed that is a
    photo."""
    max_title: int = 4_096
    """Characters to which a longer title is cut; cut titles are counted and marked."""
    shard_items: int = 5_000
    """Largest number of items in one tar file."""
    seed: int = 0
    """Seed of the order of the items in the tar files."""
    workers: int = field(default=1, metadata=NO_EFFECT_ON_RESULT)
    """Processes that prepare photos and write tar files."""

    def __post_init__(self) -> None:
        for name in ("size", "max_pixels", "max_title", "shard_items", "workers"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name}: {getattr(self, name)}, must be at least 1")
        if not 1 <= self.quality <= 95:
            raise BadInput(f"quality: {self.quality}, must be 1 to 95")
