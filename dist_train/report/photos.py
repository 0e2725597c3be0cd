"""Photos small enough to lie inside the page."""

import base64
import io

from PIL import Image, ImageOps

LONGEST_SIDE = 160
QUALITY = 70


def thumbnail(photo: bytes | None) -> str | None:
    """A data URI of a JPEG of at most 160 pixels; None without a photo that can be read."""
    if not photo:
        return None
    try:
        with Image.open(io.BytesIO(photo)) as image:
            small = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
