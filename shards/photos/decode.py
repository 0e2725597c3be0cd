"""Stored bytes to an RGB image of the requested size, by one of three recipes."""

from typing import Literal

from PIL import Image

from shards.photos.srgb import MAX_PIXELS, bound_by, exact_pixels, open_photo, refused, rgb_pixels

Recipe = Literal["exact", "balanced", "fast"]
"""How photos are decoded; measured figures in docs/design/photos.md.

exact: at full size, then Pillow's antialiased bicubic. balanced: a JPEG at the smallest of 1/8,
1/4, 1/2 and 1/1 that is still twice the requested size, then bicubic; about 48 dB to exact.
fast: at the smallest that still is the requested size; about 36 dB.
"""
LEAST = {"balanced": 2, "fast": 1}
"""The least size to decode at, in multiples of the requested size."""


def decode_photo(
    data: bytes, short_side: int, recipe: Recipe = "balanced", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """RGB image, upright, whose short side is `short_side` pixels.

    Raises PhotoRefused (a ValueError) for damaged or cut bytes, and for a photo of more than
    `max_pixels`, of which only the header is read.
    """
    try:
        with bound_by(max_pixels):
            image = open_photo(data, max_pixels)
            if recipe == "exact":
                return Image.fromarray(exact_pixels(image, short_side))
            least = LEAST[recipe] * short_side
            return Image.fromarray(rgb_pixels(data, image, short_side, least))
    except Exception as error:
        raise refused(error) from None
