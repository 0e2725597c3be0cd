"""A drawing surface for packs: shapes with soft edges and the light of a studio."""

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw

RGB = tuple[int, int, int]

SIDE = 320
"""Width and height of a finished picture, pixels; drawing is done at twice that."""
_GRID = 1000
_SCALE = 2 * SIDE / _GRID

# How much light falls on a body from its left edge to its right one; over 1 is gloss.
_PROFILES = {
    "flat": (1.0, 1.0),
    "round": (0.58, 0.86, 1.06, 1.28, 1.08, 0.98, 0.9, 0.76, 0.52),
    "metal": (0.5, 1.2, 0.8, 1.35, 0.9, 0.7, 1.1, 0.6),
    "slope": (1.1, 1.02, 0.96, 0.86),
    "side": (0.76, 0.62),
    "soft": (0.82, 0.98, 1.08, 1.04, 0.96, 0.78),
    "foil": (0.78, 1.12, 0.94, 1.04, 0.98, 1.2, 0.9, 0.74),
}


def mix(one: RGB, other: RGB, share: float) -> RGB:
    """The colour `share` (0 to 1) of the way from one to the other."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def lit(colour: RGB, light: float) -> RGB:
    """The colour under `light` times the usual light; above 1 it goes towards white."""
    if light <= 1:
        red, green, blue = (round(part * light) for part in colour)
        return red, green, blue
    return mix(colour, (255, 255, 255), min(1.0, light - 1))


@lru_cache(maxsize=512)
def _strip(colour: RGB, shade: str) -> Image.Image:
    tones = [lit(colour, light) for light in _PROFILES[shade]]
    strip = Image.new("RGB", (len(tones), 1))
    strip.putdata(tones)
    return strip


def shaded(width: int, height: int, colour: RGB, shade: str) -> Image.Image:
    """An RGB surface of that colour, lit from left to right by a named profile."""
    if shade == "flat":
        return Image.new("RGB", (width, height), colour)
    wide = _strip(colour, shade).resize((width, 1), Image.Resampling.BILINEAR)
    return wide.resize((width, height), Image.Resampling.NEAREST)


class Canvas:
    """Draws on a grid of 1000 by 1000; `finished` gives a picture of SIDE pixels."""

    def __init__(self):
        self._image = Image.new("RGB", (2 * SIDE, 2 * SIDE))
        self._mask = Image.new("L", (2 * SIDE, 2 * SIDE))

    def polygon(self, points: Sequence[tuple], colour: RGB, shade: str = "flat") -> None:
        self._solid("polygon", [(x * _SCALE, y * _SCALE) for x, y in points], colour, shade)

    def ellipse(self, box: Sequence[float], colour: RGB, shade: str = "flat") -> None:
        x0, y0, x1, y1 = (value * _SCALE for value in box)
        self._solid("ellipse", [(x0, y0), (x1, y1)], colour, shade)

    def block(
        self, box: Sequence[float], colour: RGB, shade: str = "flat", radius: float = 0
    ) -> None:
        """A rectangle with rounded corners."""
        x0, y0, x1, y1 = (value * _SCALE for value in box)
        corners = [(x0, y0), (x1, y1)]
        self._solid("rounded_rectangle", corners, colour, shade, radius=radius * _SCALE)

    def blob(self, points: Sequence[tuple], colour: RGB, shade: str = "flat") -> None:
        """A closed smooth curve through the points."""
        self.polygon(_smooth(points, closed=True), colour, shade)

    def line(
        self, points: Sequence[tuple], colour: RGB, width: float, smooth: bool = False
    ) -> None:
        path = _smooth(points, closed=False) if smooth else points
        scaled = [(x * _SCALE, y * _SCALE) for x, y in path]
        thick = max(1, round(width * _SCALE))
        ImageDraw.Draw(self._image).line(scaled, colour, thick, "curve")
        ImageDraw.Draw(self._mask).line(scaled, 255, thick, "curve")

    def art(
        self, box: Sequence[float], picture: Image.Image, shade: str = "flat", radius: float = 0
    ) -> None:
        """Lay a flat RGB picture (a label) over the box, lit as the body under it is."""
        x0, y0, x1, y1 = (round(value * _SCALE) for value in box)
        size = (x1 - x0, y1 - y0)
        picture = (
            picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR)
        )
        if shade != "flat":
            # Light above 1 cannot be multiplied in, so the profile is halved and regained.
            light = shaded(*size, (127, 127, 127), shade)
            picture = ImageChops.multiply(picture, ImageChops.add(light, light, 1.12))
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, *size), radius * _SCALE, 255)
        self._image.paste(picture, (x0, y0), mask)
        self._mask.paste(mask, (x0, y0), mask)

    def gloss(self, box: Sequence[float], strength: float = 0.5, radius: float = 40) -> None:
        """A pale reflex on something already drawn."""
        x0, y0, x1, y1 = (round(value * _SCALE) for value in box)
        mask = Image.new("L", (x1 - x0, y1 - y0), 0)
        corners = (0, 0, x1 - x0 - 1, y1 - y0 - 1)
        ImageDraw.Draw(mask).rounded_rectangle(corners, radius * _SCALE, round(255 * strength))
        self._image.paste((255, 255, 255), (x0, y0), mask)

    def finished(self) -> Image.Image:
        """The drawing as RGBa (premultiplied, which is what turning it needs), SIDE square."""
        picture = self._image.reduce(2)
        mask = self._mask.reduce(2)
        # Nothing but black lies outside the mask, so colours come out premultiplied by it.
        return Image.merge("RGBa", (*picture.split(), mask))

    def _solid(self, figure: str, points: list, colour: RGB, shade: str, **more) -> None:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        left, top = int(min(xs)), int(min(ys))
        size = (int(max(xs)) - left + 2, int(max(ys)) - top + 2)
        mask = Image.new("L", size, 0)
        local = [(x - left, y - top) for x, y in points]
        getattr(ImageDraw.Draw(mask), figure)(local, fill=255, **more)
        self._image.paste(shaded(*size, colour, shade), (left, top), mask)
        self._mask.paste(255, (left, top), mask)


def _smooth(points: Sequence[tuple], closed: bool, steps: int = 8) -> list[tuple]:
    """A Catmull-Rom curve through the points."""
    count = len(points)
    at = (lambda i: points[i % count]) if closed else (lambda i: points[min(max(i, 0), count - 1)])
    path = []
    for i in range(count if closed else count - 1):
        quad = at(i - 1), at(i), at(i + 1), at(i + 2)
        path += [_spline(quad, step / steps) for step in range(steps)]
    return path if closed else [*path, points[-1]]


def _spline(quad: tuple, t: float) -> tuple[float, float]:
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = quad
    w0, w1 = t * (2 - t) * t - t, t * t * (3 * t - 5) + 2
    w2, w3 = t * (1 + t * (4 - 3 * t)), t * t * (t - 1)
    x = (w0 * ax + w1 * bx + w2 * cx + w3 * dx) / 2
    return x, (w0 * ay + w1 * by + w2 * cy + w3 * dy) / 2
