"""What a seller puts a product in front of: studio paper, tables, cloth, tiles, posters."""

from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from dist_train.synthetic.brands import tone
from dist_train.synthetic.canvas import RGB, lit, mix
from dist_train.synthetic.randomness import Dice

_LEVELS = np.linspace(0, 1, 256)
_WOODS = (
    *(((84, 52, 30), (170, 118, 74)), ((150, 116, 82), (216, 186, 146))),
    *(((60, 50, 44), (120, 104, 92)), ((190, 184, 174), (240, 236, 228))),
)
_SMOOTH = Image.Resampling.BICUBIC


def backdrop(dice: Dice, width: int, height: int) -> Image.Image:
    """An RGB background of that size in pixels."""
    kind = dice.weighted([share for share, _ in _KINDS])
    return _KINDS[kind][1](dice, width, height)


def studio(dice: Dice, width: int, height: int) -> Image.Image:
    """Paper with light falling off towards one side, as in a brand's own pictures."""
    paper = dice.pick(((255, 255, 255), (250, 250, 252), (240, 240, 238)))
    return _sheen(dice, width, height, paper, 0.04)


def _sheen(dice: Dice, width: int, height: int, colour: RGB, depth: float) -> Image.Image:
    """One colour, brighter here and darker there, without edges."""
    light = Image.frombytes("L", (3, 3), bytes(dice.below(256) for _ in range(9)))
    wide = light.resize((width, height), _SMOOTH)
    return _coloured(wide, lit(colour, 1 - depth), lit(colour, 1 + depth / 2))


def _pastel(dice: Dice, width: int, height: int) -> Image.Image:
    return _sheen(dice, width, height, tone(dice, (0.72, 0.9), (0.25, 0.8)), 0.16)


def _room(dice: Dice, width: int, height: int) -> Image.Image:
    """A wall and the table before it."""
    wall = _sheen(dice, width, height, tone(dice, (0.45, 0.9), (0.05, 0.5)), 0.2)
    table = _planks if dice.chance(0.5) else _pastel
    top = round(height * dice.between(0.55, 0.8))
    wall.paste(table(dice, width, height - top), (0, top))
    return wall


def _planks(dice: Dice, width: int, height: int) -> Image.Image:
    """Wooden boards: noise pulled out along the grain."""
    dark, light = dice.pick(_WOODS)
    grain = Image.fromarray(dice.grain(48, 5)).resize((width, height), _SMOOTH)
    board = _coloured(grain, dark, light)
    draw, step = ImageDraw.Draw(board), 40 + dice.below(50)
    for y in range(dice.below(step), height, step):
        draw.line((0, y, width, y), lit(dark, 0.6), 2)
    return board if dice.chance(0.6) else board.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _coloured(grey: Image.Image, dark: RGB, light: RGB) -> Image.Image:
    """The grey picture from one colour (its black) to another (its white)."""
    steps = np.multiply.outer(np.subtract(light, dark), _LEVELS) + np.reshape(dark, (3, 1))
    table = steps.round().clip(0, 255).astype(int).ravel().tolist()
    return Image.merge("RGB", (grey, grey, grey)).point(table)


def _cloth(dice: Dice, width: int, height: int) -> Image.Image:
    """Rumpled cloth: large folds with a fine weave on them."""
    colour = tone(dice, (0.35, 0.85), (0.05, 0.6))
    folds = Image.fromarray(dice.grain(7, 7)).resize((width, height), _SMOOTH)
    weave = Image.fromarray(dice.grain(height // 2, width // 2)).resize((width, height))
    return _coloured(Image.blend(folds, weave, 0.22), lit(colour, 0.62), lit(colour, 1.15))


def _marble(dice: Dice, width: int, height: int) -> Image.Image:
    field = dice.grain(12, 12).astype("int16")
    veins = (abs(field - 128) * 2).clip(0, 255).astype("uint8")
    stone = Image.fromarray(veins).resize((width, height), _SMOOTH)
    dark, light = dice.pick((((176, 176, 182), (246, 246, 244)), ((24, 26, 30), (84, 86, 92))))
    return _coloured(stone.point(lambda level: min(255, level * 3)), dark, light)


def _tiles(dice: Dice, width: int, height: int) -> Image.Image:
    colour = tone(dice, (0.55, 0.92), (0.02, 0.45))
    floor = _sheen(dice, width, height, colour, 0.2)
    draw, step = ImageDraw.Draw(floor), 50 + dice.below(70)
    for x in range(dice.below(step), width, step):
        draw.line((x, 0, x, height), lit(colour, 0.75), 3)
    for y in range(dice.below(step), height, step):
        draw.line((0, y, width, y), lit(colour, 0.75), 3)
    return floor


def _poster(dice: Dice, width: int, height: int) -> Image.Image:
    """Rays of two colours behind the bargain of the day."""
    colour = tone(dice, (0.45, 0.7), (0.6, 1.0))
    picture = Image.new("RGB", (width, height), colour)
    draw, pale = ImageDraw.Draw(picture), mix(colour, (255, 255, 255), dice.between(0.2, 0.6))
    x, y, count = (
        width * dice.between(0.3, 0.7),
        height * dice.between(0.3, 0.7),
        10 + dice.below(9),
    )
    for ray in range(count):
        ends = [2 * pi * (ray + part) / count for part in (0, 0.5)]
        tips = [(x + 900 * cos(end), y + 900 * sin(end)) for end in ends]
        draw.polygon([(x, y), *tips], pale)
    return picture


def _lights(dice: Dice, width: int, height: int) -> Image.Image:
    """A shop far behind, out of focus."""
    scene = _sheen(dice, width, height, tone(dice, (0.12, 0.4), (0.2, 0.7)), 0.3)
    glow = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(glow)
    for _ in range(14):
        x, y, r = dice.below(width), dice.below(height), 8 + dice.below(34)
        draw.ellipse((x - r, y - r, x + r, y + r), tone(dice, (0.15, 0.4), (0.3, 0.9)))
    return ImageChops.add(scene, glow.reduce(4).resize((width, height), _SMOOTH))


_KINDS = (
    *((0.26, studio), (0.18, _pastel), (0.16, _room), (0.10, _planks), (0.09, _cloth)),
    *((0.06, _marble), (0.06, _tiles), (0.05, _poster), (0.04, _lights)),
)
