"""Light, lens and sensor: what happens to a scene on its way into a file."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from dist_train.synthetic.randomness import Dice

_LEVELS = np.arange(256.0)


def exposed(dice: Dice, scene: Image.Image, care: float) -> Image.Image:
    """Shadow over a side, brightness, contrast and colour cast; `care` near 1 leaves it alone."""
    slack = 1 - care
    if dice.chance(0.6 * slack):
        corners = bytes(round(255 - dice.unit() * 130 * slack) for _ in range(4))
        veil = Image.frombytes("L", (2, 2), corners).resize(scene.size, Image.Resampling.BILINEAR)
        scene = ImageChops.multiply(scene, Image.merge("RGB", (veil, veil, veil)))
    gain, lift = 1 + dice.bell(0.13) * slack, dice.bell(16) * slack
    casts = [gain * (1 + dice.bell(0.06) * slack) for _ in range(3)]
    curves = np.multiply.outer(casts, _LEVELS - 128) + (128 + lift)
    return scene.point(curves.round().clip(0, 255).astype(int).ravel().tolist())


def focused(dice: Dice, scene: Image.Image, care: float) -> Image.Image:
    """Now and then a little out of focus, or enlarged from a small copy."""
    draw, slack = dice.unit(), 1 - care
    if draw < 0.22 * slack:
        return scene.filter(ImageFilter.BoxBlur(dice.between(0.5, 1.7)))
    if draw < 0.32 * slack:
        width, height = scene.size
        share = dice.between(0.4, 0.7)
        small = scene.resize((round(width * share), round(height * share)))
        return small.resize(scene.size, Image.Resampling.BILINEAR)
    return scene


def developed(dice: Dice, scene: Image.Image, care: float) -> bytes:
    """Sensor noise, then a JPEG of quality 60 to 92."""
    if dice.chance(0.75 * (1 - care)):
        width, height = scene.size
        depth = dice.between(0.02, 0.11)
        grain = Image.fromarray(dice.grain(height, width))
        flat = [round(128 + (level - 128) * depth * 1.5) for level in range(256)]
        noise = grain.point(flat)
        scene = ImageChops.add(scene, Image.merge("RGB", (noise, noise, noise)), 1, -128)
    file = BytesIO()
    scene.save(file, "JPEG", quality=60 + dice.below(33))
    return file.getvalue()
