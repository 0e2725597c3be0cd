"""The printed label of a pack: pattern, mark, brand, line, kind and size."""

from functools import lru_cache
from math import cos, pi, sin

from PIL import Image, ImageDraw, ImageFont

from dist_train.synthetic.canvas import RGB, lit, mix
from dist_train.synthetic.looks import Look

WIDTH = 260
"""Labels are printed at this width, pixels, then laid on the pack at any size."""


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    # The font inside Pillow: the machine's own fonts would change the pictures.
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow was built with FreeType
    return font


def write(
    draw: ImageDraw.ImageDraw, at: tuple, text: str, fit: tuple, ink: RGB | int, bold: int = 0
) -> None:
    """Centre the text at a point, as large as the (width, height) of `fit` allows."""
    size = min(fit[1], fit[0] / max(0.1, _font(40).getlength(text) / 40 + bold * 0.05))
    font = _font(max(8, round(size / 2) * 2))
    draw.text(at, text, ink, font, "mm", stroke_width=bold)


def label(look: Look, ratio: float, stamped: bool = True) -> Image.Image:
    """A label, RGB, WIDTH wide and `ratio` times as high; `stamped` prints the size on it."""
    height = max(60, round(WIDTH * ratio))
    picture = Image.new("RGB", (WIDTH, height), look.paper)
    draw = ImageDraw.Draw(picture)
    soft = mix(look.paper, look.accent, 0.55)
    _PATTERNS[look.pattern](draw, WIDTH, height, soft, look.turn)
    _LAYOUTS[look.layout](draw, WIDTH, height, look)
    if stamped:
        _stamp(draw, WIDTH, height, look)
    return picture


def mark(draw: ImageDraw.ImageDraw, at: tuple, radius: float, look: Look, ink: RGB) -> None:
    """The brand's mark around a point."""
    x, y = at
    if look.mark in ("circle", "ring"):
        box = (x - radius, y - radius, x + radius, y + radius)
        thick = max(2, round(radius / 3))
        fill = ink if look.mark == "circle" else None
        draw.ellipse(box, fill=fill, outline=ink, width=thick)
    else:
        figure = _MARKS[look.mark]
        draw.polygon([(x + radius * dx, y + radius * dy) for dx, dy in figure], fill=ink)
    if look.mark in ("circle", "shield", "hexagon"):
        write(draw, (x, y), look.brand[0], (radius, radius * 1.3), look.paper, 1)


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    radii = [1.0, inner] * points
    return [(r * sin(pi * i / points), -r * cos(pi * i / points)) for i, r in enumerate(radii)]


_MARKS = {
    "shield": [(-0.9, -1), (0.9, -1), (0.9, 0.2), (0, 1.1), (-0.9, 0.2)],
    "hexagon": [(sin(pi * i / 3), cos(pi * i / 3)) for i in range(6)],
    "star": _star(5, 0.42),
    "leaf": [(0, -1.1), (0.55, -0.5), (0.6, 0.2), (0, 1.1), (-0.6, 0.2), (-0.55, -0.5)],
    "crown": [(-1, -0.6), (-0.5, 0), (0, -0.9), (0.5, 0), (1, -0.6), (0.8, 0.8), (-0.8, 0.8)],
    "peak": [(-1.1, 0.8), (-0.3, -0.8), (0.1, 0), (0.4, -0.4), (1.1, 0.8)],
    "drop": [(0, -1.1), (0.5, -0.2), (0.65, 0.4), (0.3, 0.9), (-0.3, 0.9), (-0.65, 0.4),
             (-0.5, -0.2)],
    "bolt": [(0.2, -1.1), (-0.6, 0.2), (0, 0.2), (-0.2, 1.1), (0.6, -0.3), (0, -0.3)],
}  # fmt: skip


def _stripes(draw, w, h, ink, turn):
    step = 16 + turn % 40
    lean = (turn % 5 - 2) * h // 4
    for x in range(-h, w + h, step):
        draw.line((x, 0, x + lean, h), ink, step // 3)


def _dots(draw, w, h, ink, turn):
    step = 20 + turn % 26
    size = 4 + turn % 7
    for row, y in enumerate(range(0, h + step, step)):
        for x in range(-(row % 2) * step // 2, w + step, step):
            draw.ellipse((x - size, y - size, x + size, y + size), ink)


def _waves(draw, w, h, ink, turn):
    top, swing = h * (0.5 + turn % 4 / 10), h * 0.07
    for layer in range(3):
        crest = [
            (x, top + layer * h * 0.13 + swing * sin(x / (18 + turn % 30) + layer))
            for x in range(0, w + 12, 12)
        ]
        draw.polygon([*crest, (w, h), (0, h)], lit(ink, 1 - 0.12 * layer))


def _rays(draw, w, h, ink, turn):
    x, y, count = w / 2, h * (0.35 + turn % 4 / 10), 9 + turn % 8
    for i in range(count):
        ends = [2 * pi * (i + part) / count for part in (0, 0.5)]
        tips = [(x + (w + h) * cos(end), y + (w + h) * sin(end)) for end in ends]
        draw.polygon([(x, y), *tips], ink)


def _diamonds(draw, w, h, ink, turn):
    step = 36 + turn % 40
    for y in range(0, h + step, step):
        for x in range(0, w + step, step):
            half = step * 0.36
            draw.polygon([(x, y - half), (x + half, y), (x, y + half), (x - half, y)], ink)


def _leaves(draw, w, h, ink, turn):
    for i in range(10):
        x, y = (i * 97 + turn) % w, (i * 61 + turn * 3) % h
        s = 22 + (i * 13 + turn) % 26
        draw.chord((x - s, y - s, x + s, y + s), 30 + turn % 90, 170 + turn % 90, ink)


def _halves(draw, w, h, ink, turn):
    cut = h * (0.35 + turn % 5 / 12)
    draw.polygon([(0, cut), (w, cut + (turn % 7 - 3) * h / 14), (w, h), (0, h)], ink)


def _checks(draw, w, h, ink, turn):
    step = 30 + turn % 30
    for row in range(h // step + 1):
        for column in range(row % 2, w // step + 1, 2):
            draw.rectangle(
                (column * step, row * step, column * step + step, row * step + step), ink
            )


def _plain(draw, w, h, ink, turn):
    draw.rectangle((8, 8, w - 9, h - 9), outline=ink, width=4)


_PATTERNS = {
    **{"plain": _plain, "stripes": _stripes, "dots": _dots, "waves": _waves, "rays": _rays},
    **{"diamonds": _diamonds, "leaves": _leaves, "halves": _halves, "checks": _checks},
}


def _brand(draw, at, fit, look, ink):
    bold = {"bold": 2, "plain": 1, "outline": 1, "spaced": 0}[look.face]
    text = " ".join(look.brand.upper()) if look.face == "spaced" else look.brand
    text = text.upper() if look.face == "bold" else text
    write(draw, at, text, fit, ink, bold)


def _centred(draw, w, h, look):
    draw.rounded_rectangle((w * 0.07, h * 0.2, w * 0.93, h * 0.74), 18, look.paper)
    mark(draw, (w / 2, h * 0.12), min(w, h) * 0.1, look, look.ink)
    _brand(draw, (w / 2, h * 0.33), (w * 0.8, h * 0.2), look, look.ink)
    write(draw, (w / 2, h * 0.5), look.name or look.feature, (w * 0.7, h * 0.12), look.ink)
    write(draw, (w / 2, h * 0.64), look.kind, (w * 0.74, h * 0.1), look.ink)


def _banner(draw, w, h, look):
    draw.rectangle((0, h * 0.24, w, h * 0.56), lit(look.accent, 0.75))
    _brand(draw, (w / 2, h * 0.4), (w * 0.86, h * 0.26), look, (255, 255, 255))
    mark(draw, (w * 0.16, h * 0.12), min(w, h) * 0.09, look, look.ink)
    write(draw, (w * 0.6, h * 0.13), look.name or look.kind, (w * 0.6, h * 0.12), look.ink, 1)
    write(draw, (w / 2, h * 0.68), look.kind, (w * 0.8, h * 0.11), look.ink)


def _medallion(draw, w, h, look):
    r = min(w, h) * 0.36
    x, y = w / 2, h * 0.42
    draw.ellipse((x - r, y - r, x + r, y + r), look.ink)
    draw.ellipse((x - r * 0.9, y - r * 0.9, x + r * 0.9, y + r * 0.9), outline=look.paper, width=3)
    _brand(draw, (x, y - r * 0.1), (r * 1.6, r * 0.6), look, look.paper)
    write(draw, (x, y + r * 0.42), look.name or look.kind, (r * 1.2, r * 0.3), look.paper)
    write(draw, (x, h * 0.84), look.feature, (w * 0.5, h * 0.09), look.ink, 1)


def _column(draw, w, h, look):
    draw.rectangle((0, 0, w * 0.26, h), lit(look.accent, 0.7))
    mark(draw, (w * 0.13, h * 0.16), w * 0.1, look, look.paper)
    _brand(draw, (w * 0.63, h * 0.22), (w * 0.66, h * 0.2), look, look.ink)
    for place, text in enumerate((look.name, look.kind, look.feature)):
        write(draw, (w * 0.63, h * (0.42 + 0.13 * place)), text, (w * 0.64, h * 0.1), look.ink)


def _diagonal(draw, w, h, look):
    draw.polygon([(0, h * 0.5), (w, h * 0.16), (w, h * 0.52), (0, h * 0.86)], lit(look.accent, 0.8))
    _brand(draw, (w * 0.5, h * 0.14), (w * 0.84, h * 0.2), look, look.ink)
    write(
        draw, (w * 0.5, h * 0.5), look.name or look.feature, (w * 0.7, h * 0.14), (255, 255, 255), 1
    )
    mark(draw, (w * 0.84, h * 0.68), min(w, h) * 0.1, look, look.ink)


_LAYOUTS = {
    **{"centred": _centred, "banner": _banner, "medallion": _medallion},
    **{"column": _column, "diagonal": _diagonal},
}


def _stamp(draw, w, h, look):
    """The size, small, in a corner that the line has chosen."""
    right = look.turn % 2
    x, y = w * (0.76 if right else 0.24), h * 0.91
    fit = (w * 0.36, min(h * 0.11, 34))
    draw.rounded_rectangle(
        (x - w * 0.2, y - fit[1] * 0.7, x + w * 0.2, y + fit[1] * 0.7), 8, look.paper
    )
    write(draw, (x, y), look.stamp, fit, look.ink, 1)
