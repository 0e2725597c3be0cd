"""Invented brands: what they make, their house colour and mark."""

from colorsys import hls_to_rgb
from functools import lru_cache
from typing import NamedTuple

from dist_train.synthetic.kinds import FAMILIES, OF_FAMILY, Kind
from dist_train.synthetic.randomness import Dice

COUNT = 400
MARKS = ("circle", "shield", "hexagon", "star", "leaf", "crown", "peak", "drop", "bolt", "ring")
FACES = ("plain", "bold", "outline", "spaced")


def words(text: str) -> tuple[str, ...]:
    """The words of a text, as a pool to draw from."""
    return tuple(text.split())


_HEADS = words(
    "al an ar be bi bo ca ce da de di el fa fi ga gi ha in ja ka ke ki la le li lo lu ma me mi "
    "mo na ne ni no nu or pa pe pi po ra re ri ro sa se si so ta te ti to tu va ve vi wa we xe "
    "ya yo za ze zi zo"
)
_TAILS = words(
    "dan dex dora fia go kan ko la lan lex lia lin lo lux ma mi mo na nara nia no ra ran rex ri "
    "ro rin sa sia so ta tex tha tra va vel via vin vo xa ya yu zen zia zo"
)


class Brand(NamedTuple):
    """An invented brand and the two kinds of things it makes; `house` is its RGB colour."""

    number: int
    name: str
    kinds: tuple[Kind, ...]
    house: tuple[int, int, int]
    mark: str
    face: str


def invented_word(dice: Dice) -> str:
    """Two or three syllables, capitalised: "Velora", "Kinza", …"""
    word = dice.pick(_HEADS) + dice.pick(_TAILS)
    if len(word) < 6 or dice.chance(0.3):
        word = dice.pick(_HEADS) + word
    return word.capitalize()


def tone(dice: Dice, light: tuple[float, float], rich: tuple[float, float]) -> tuple[int, int, int]:
    """An RGB colour of any hue within a range of lightness and saturation (0 to 1)."""
    red, green, blue = hls_to_rgb(dice.unit(), dice.between(*light), dice.between(*rich))
    return round(255 * red), round(255 * green), round(255 * blue)


@lru_cache(maxsize=4)
def brands(seed: int) -> tuple[Brand, ...]:
    """All COUNT brands of a catalogue, by descending popularity, their names distinct."""
    taken: dict[str, Brand] = {}
    dice = Dice(seed, "brands")
    while len(taken) < COUNT:
        name = invented_word(dice)
        kinds = list(OF_FAMILY[FAMILIES[len(taken) % len(FAMILIES)]])
        dice.shuffle(kinds)
        house = tone(dice, (0.25, 0.62), (0.45, 0.95))
        brand = Brand(len(taken), name, tuple(kinds[:2]), house, dice.pick(MARKS), dice.pick(FACES))
        taken.setdefault(name, brand)
    return tuple(taken.values())


def pick_brand(dice: Dice, seed: int) -> Brand:
    """A brand; the first tenth of them make almost half of the lines."""
    share = dice.unit()
    return brands(seed)[int(share * share * share * COUNT)]
