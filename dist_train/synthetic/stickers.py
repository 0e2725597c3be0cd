"""What sellers paste over their photos: badges, ribbons, frames, watermarks."""

from PIL import Image, ImageDraw

from dist_train.synthetic.brands import invented_word, tone
from dist_train.synthetic.canvas import mix
from dist_train.synthetic.labels import write
from dist_train.synthetic.randomness import Dice

_WORDS = ("PROMO", "COD", "ORI", "SALE", "READY", "NEW", "-50%", "HOT", "TERMURAH", "BPOM", "100%")
_RIBBONS = (
    "READY STOCK",
    "BISA COD",
    "GRATIS ONGKIR",
    "100% ORIGINAL",
    "GROSIR MURAH",
    "FLASH SALE",
)
_WHITE = (255, 255, 255)


def paste_stickers(dice: Dice, photo: Image.Image) -> None:
    """None, one or several of them, drawn into the RGB photo."""
    for share, sticker in ((0.22, _badge), (0.13, _ribbon), (0.10, _frame), (0.12, _watermark)):
        if dice.chance(share):
            sticker(dice, photo)


def _badge(dice: Dice, photo: Image.Image) -> None:
    """A round seal or a rectangle in one of the corners."""
    draw, (width, height) = ImageDraw.Draw(photo), photo.size
    radius = dice.between(0.08, 0.15) * width
    x = dice.pick((radius * 1.15, width - radius * 1.15))
    y = dice.pick((radius * 1.15, height - radius * 1.15))
    colour = tone(dice, (0.4, 0.55), (0.8, 1.0))
    box = (x - radius, y - radius, x + radius, y + radius)
    if dice.chance(0.5):
        draw.ellipse(box, colour, (255, 246, 180), 4)
    elif dice.chance(0.5):
        draw.rounded_rectangle((box[0], y - radius * 0.5, box[2], y + radius * 0.5), 8, colour)
    else:
        draw.regular_polygon((x, y, radius), 8, dice.below(45), colour, _WHITE)
    write(draw, (x, y), dice.pick(_WORDS), (radius * 1.6, radius * 0.8), _WHITE, 1)


def _ribbon(dice: Dice, photo: Image.Image) -> None:
    """A bar with the seller's promise along the top or the bottom."""
    draw, (width, height) = ImageDraw.Draw(photo, "RGBA"), photo.size
    tall = height * dice.between(0.08, 0.14)
    top = dice.pick((0, height - tall))
    colour = tone(dice, (0.3, 0.55), (0.6, 1.0))
    draw.rectangle((0, top, width, top + tall), (*colour, 190 + dice.below(66)))
    text = dice.pick(_RIBBONS) if dice.chance(0.6) else f"{invented_word(dice)} Shop".upper()
    write(draw, (width / 2, top + tall / 2), text, (width * 0.8, tall * 0.66), _WHITE, 1)


def _frame(dice: Dice, photo: Image.Image) -> None:
    draw, (width, height) = ImageDraw.Draw(photo), photo.size
    colour, thick = tone(dice, (0.3, 0.7), (0.4, 1.0)), 6 + dice.below(14)
    draw.rectangle((0, 0, width - 1, height - 1), outline=colour, width=thick)
    if dice.chance(0.5):
        inner = (thick + 3, thick + 3, width - thick - 4, height - thick - 4)
        draw.rectangle(inner, outline=mix(colour, _WHITE, 0.6), width=2)


def _watermark(dice: Dice, photo: Image.Image) -> None:
    """The shop's name across the photo, half transparent."""
    width, height = photo.size
    text = f"{invented_word(dice)} {dice.pick(('store', 'shop', 'olshop', 'official'))}"
    at = (width * dice.between(0.3, 0.7), height * dice.between(0.25, 0.85))
    mask = Image.new("L", photo.size)
    write(ImageDraw.Draw(mask), at, text, (width * 0.6, 34), 110 + dice.below(80))
    photo.paste(dice.pick((_WHITE, (30, 30, 30))), (0, 0), mask)
