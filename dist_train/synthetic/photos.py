"""The photo of one posting: one seller's scene of a product, as JPEG bytes."""

from PIL import Image

from dist_train.synthetic.backdrops import backdrop, studio
from dist_train.synthetic.camera import developed, exposed, focused
from dist_train.synthetic.canvas import SIDE
from dist_train.synthetic.packs import pack
from dist_train.synthetic.perspective import Point, bounds, coefficients, corners
from dist_train.synthetic.products import Product
from dist_train.synthetic.randomness import Dice
from dist_train.synthetic.stickers import paste_stickers

REUSED = 0.12
"""Chance that a posting takes the very file of an earlier one; it makes about 8 % of all."""
PRESS = 0.45
"""Share of photos made from the brand's own press picture instead of a new scene."""

_SHAPES = ((360, 360), (360, 360), (400, 400), (320, 320), (320, 400), (330, 440), (420, 320))


def photo_number(product: Product, posting: int) -> int:
    """Which photo of the product this posting shows: its own, or that of an earlier posting."""
    dice = Dice(product.line.seed, "reuse", product.number, posting)
    while posting and dice.chance(REUSED):
        posting = dice.below(posting)
        dice = Dice(product.line.seed, "reuse", product.number, posting)
    return posting


def photograph(product: Product, number: int) -> bytes:
    """JPEG bytes, 320 to 480 pixels a side; a pure function of the product and the number."""
    dice = Dice(product.line.seed, "photo", product.number, number)
    press = dice.chance(PRESS)
    scene = _press_picture(product, dice) if press else _scene(product, dice)
    care = 0.9 if press else 0.0
    scene = focused(dice, exposed(dice, scene, care), care)
    paste_stickers(dice, scene)
    return developed(dice, scene, care)


def _press_picture(product: Product, dice: Dice) -> Image.Image:
    """The brand's own shot, the same for all its sellers but for how each of them cut it."""
    brand = Dice(product.line.seed, "press", product.number)
    picture = studio(brand, 360, 360)
    _place(brand, picture, product, (180, 181), 334, tilt=3, depth=0.01)
    edge = dice.below(12)
    box = (edge, dice.below(12), 360 - dice.below(12), 360 - edge)
    return picture.resize(dice.pick(((360, 360), (320, 320), (400, 400))), box=box)


def _scene(product: Product, dice: Dice) -> Image.Image:
    """A new photo: alone, twice, beside another variant, or with a close view set in."""
    width, height = dice.pick(_SHAPES)
    picture = backdrop(dice, width, height)
    short, draw = min(width, height), dice.unit()
    if draw < 0.12:
        _pair(dice, picture, product)
        return picture
    side = short * dice.between(0.72, 1.18)
    centre = (width / 2 + dice.bell(0.05) * short, height / 2 + dice.bell(0.05) * short)
    _place(dice, picture, product, centre, side, tilt=11, depth=0.035)
    if draw < 0.20:
        _close_view(dice, picture, product)
    return picture


def _pair(dice: Dice, picture: Image.Image, product: Product) -> None:
    """Two side by side; the one behind may be another variant of the line."""
    width, height = picture.size
    other = product
    if dice.chance(0.6):
        other = product._replace(variant=dice.below(len(product.line.variants)))
    side = min(width, height) * dice.between(0.58, 0.74)
    behind, before = (0.32, 0.66) if dice.chance(0.5) else (0.68, 0.34)
    _place(dice, picture, other, (width * behind, height * 0.45), side * 0.9, tilt=8, depth=0.02)
    _place(dice, picture, product, (width * before, height * 0.54), side, tilt=8, depth=0.02)


def _close_view(dice: Dice, picture: Image.Image, product: Product) -> None:
    """An inset with the label up close, framed in white."""
    width, height = picture.size
    side = round(min(width, height) * dice.between(0.26, 0.36))
    inset = studio(dice, side, side)
    _place(dice, inset, product, (side / 2, side * 0.4), side * 1.9, tilt=5, depth=0.01)
    framed = Image.new("RGB", (side + 8, side + 8), (255, 255, 255))
    framed.paste(inset, (4, 4))
    x, y = dice.pick((6, width - side - 14)), dice.pick((6, height - side - 14))
    picture.paste(framed, (x, y))


def _place(
    dice: Dice,
    picture: Image.Image,
    product: Product,
    centre: Point,
    side: float,
    *,
    tilt: float,
    depth: float,
) -> None:
    """Set the product into the picture with its shadow, `side` pixels large."""
    side *= _growth(product)
    quad, drawn = corners(dice, centre, side, tilt, depth), pack(product)
    u0, v0, u1, v1 = (edge / SIDE for edge in drawn.getbbox() or (0, 0, SIDE, SIDE))
    left, top, right, bottom = bounds(quad, (u0, v0, u1, v1))
    box = max(0, left), max(0, top), min(picture.width, right), min(picture.height, bottom)
    shifted = [(x - box[0], y - box[1]) for x, y in quad]
    size, way = (box[2] - box[0], box[3] - box[1]), Image.Transform.PERSPECTIVE
    seen = drawn.transform(size, way, coefficients(shifted, SIDE), Image.Resampling.BILINEAR)
    seen = seen.convert("RGBA")
    _shadow(dice, picture, seen, box)
    picture.paste(seen, box[:2], seen)


def _growth(product: Product) -> float:
    """A larger size fills a little more of the photo: too little to tell it by."""
    sizes = product.line.kind.sizes
    return 0.96 + 0.07 * sizes.index(product.size) / max(1, len(sizes) - 1)


def _shadow(dice: Dice, picture: Image.Image, seen: Image.Image, box: tuple) -> None:
    """A soft dark copy of what is seen, a few pixels below it."""
    shift = round(dice.bell(7)), 3 + dice.below(10)
    strength = dice.between(0.12, 0.5)
    tiny = seen.getchannel("A").reduce(12)
    soft = tiny.resize(seen.size, Image.Resampling.BILINEAR)
    dark = soft.point([round(level * strength) for level in range(256)])
    picture.paste((20, 18, 22), (box[0] + shift[0], box[1] + shift[1]), dark)
