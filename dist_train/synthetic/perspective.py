"""Where each pixel of a photographed product comes from."""

from math import cos, pi, sin

from dist_train.synthetic.randomness import Dice

Point = tuple[float, float]


def corners(dice: Dice, centre: Point, side: float, tilt: float, depth: float) -> list[Point]:
    """The four corners, clockwise from top left, of a square seen at an angle.

    `tilt` is the spread of its rotation in degrees, `depth` how far (as a share of `side`)
    each corner may come nearer or go away.
    """
    angle = dice.bell(tilt) * pi / 180
    c, s, half = cos(angle), sin(angle), side / 2
    found = []
    for x, y in ((-half, -half), (half, -half), (half, half), (-half, half)):
        x, y = x + dice.bell(depth) * side, y + dice.bell(depth) * side
        found.append((centre[0] + x * c - y * s, centre[1] + x * s + y * c))
    return found


def coefficients(quad: list[Point], side: float) -> tuple[float, ...]:
    """The eight numbers with which PIL's PERSPECTIVE fills `quad` from a square picture.

    The map from the unit square to a quadrilateral is Heckbert's (Fundamentals of Texture
    Mapping and Image Warping, 1989, section 2.2.3); its adjugate is the way back.
    """
    a, b, c, d, e, f, g, h = _from_unit_square(quad)
    back = (e - f * h, c * h - b, b * f - c * e, f * g - d, a - c * g, c * d - a * f)
    low = (d * h - e * g, b * g - a * h, a * e - b * d)
    return (*(side * n / low[2] for n in back), low[0] / low[2], low[1] / low[2])


def bounds(quad: list[Point], part: tuple[float, float, float, float]) -> tuple[int, ...]:
    """The pixels (left, top, right, bottom) that a part of the unit square covers in `quad`."""
    a, b, c, d, e, f, g, h = _from_unit_square(quad)
    found = []
    for u, v in ((part[0], part[1]), (part[2], part[1]), (part[2], part[3]), (part[0], part[3])):
        scale = g * u + h * v + 1
        found.append(((a * u + b * v + c) / scale, (d * u + e * v + f) / scale))
    xs, ys = [x for x, _ in found], [y for _, y in found]
    return int(min(xs)) - 1, int(min(ys)) - 1, int(max(xs)) + 2, int(max(ys)) + 2


def _from_unit_square(quad: list[Point]) -> tuple[float, ...]:
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = quad
    dx1, dx2, dx3 = x1 - x2, x3 - x2, x0 - x1 + x2 - x3
    dy1, dy2, dy3 = y1 - y2, y3 - y2, y0 - y1 + y2 - y3
    area = dx1 * dy2 - dx2 * dy1
    g, h = (dx3 * dy2 - dx2 * dy3) / area, (dx1 * dy3 - dx3 * dy1) / area
    across = (x1 - x0 + g * x1, x3 - x0 + h * x3, x0)
    down = (y1 - y0 + g * y1, y3 - y0 + h * y3, y0)
    return (*across, *down, g, h)
