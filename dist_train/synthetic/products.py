"""Product lines, their variants, and how many postings each product has."""

from itertools import count
from typing import NamedTuple

from dist_train.synthetic.brands import Brand, invented_word, pick_brand, words
from dist_train.synthetic.kinds import Kind
from dist_train.synthetic.randomness import Dice
from dist_train.synthetic.sizes import Size
from dist_train.synthetic.tints import PALETTES, Tint

BLOCK = 1000
"""Postings in a block. A product line never leaves its block, so blocks are independent."""

LARGEST_GROUP = 50
_GROUP_SIZES = range(2, LARGEST_GROUP + 1)
# The cube gives 62 % pairs and a mean of 3.1 postings a product, as real catalogues have.
_GROUP_WEIGHTS = [1 / (size * size * size) for size in _GROUP_SIZES]
_VARIANT_WEIGHTS = (64, 17, 9, 5, 3, 2)
_CATCHWORDS = words(
    "Gold Plus Pro Max Ultra Fresh Premium Classic Super Mini Lite Active Natural Royal Star "
    "Extra Daily Prima Nusantara Sejuk Ceria Mantap Cantik Alam Murni"
)


class Line(NamedTuple):
    """A product line: everything that its variants share."""

    seed: int
    number: int
    brand: Brand
    kind: Kind
    shape: str
    name: str
    features: tuple[tuple[str, str], ...]
    variants: tuple[tuple[Size, Tint], ...]


class Product(NamedTuple):
    """One variant of a line; its postings form one label group."""

    line: Line
    variant: int
    number: int
    postings: int

    @property
    def size(self) -> Size:
        return self.line.variants[self.variant][0]

    @property
    def tint(self) -> Tint:
        return self.line.variants[self.variant][1]

    @property
    def label_group(self) -> str:
        return f"g{self.number:08d}"


def products_of_block(seed: int, block: int) -> list[Product]:
    """The products of a block; their postings sum to BLOCK, 2 to LARGEST_GROUP each."""
    found: list[Product] = []
    left = BLOCK
    serials = count()
    while left:
        line = _line(seed, block * BLOCK + next(serials))
        dice = Dice(seed, "groups", line.number)
        for variant in range(len(line.variants)):
            if not left:
                break
            postings = _group_size(dice, left)
            found.append(Product(line, variant, block * BLOCK + len(found), postings))
            left -= postings
    return found


def _group_size(dice: Dice, left: int) -> int:
    """A group's size from the power law; one posting is never left over for the next."""
    size = min(_GROUP_SIZES[dice.weighted(_GROUP_WEIGHTS)], left)
    if left - size != 1:
        return size
    return size + 1 if size < LARGEST_GROUP else size - 1


def _line(seed: int, number: int) -> Line:
    dice = Dice(seed, "line", number)
    brand = pick_brand(dice, seed)
    kind = dice.pick(brand.kinds)
    features = list(kind.features)
    dice.shuffle(features)
    return Line(
        *(seed, number, brand, kind, dice.pick(kind.shapes), _line_name(dice)),
        *(tuple(features[:2]), _variants(dice, kind)),
    )


def _line_name(dice: Dice) -> str:
    """Nothing or a catchword, mostly; else an invented word beside it, or a model code.

    Few of them are unique: two lines of one brand and kind often share a name, and it
    takes the photo to tell them apart.
    """
    draw = dice.unit()
    if draw < 0.30:
        return ""
    if draw < 0.76:
        return dice.pick(_CATCHWORDS)
    if draw < 0.86:
        return f"{dice.pick(_CATCHWORDS)} {invented_word(dice)}"
    return f"{dice.pick('ADKMSX')}{dice.pick('BPR')}-{10 * (10 + dice.below(20))}"


def _variants(dice: Dice, kind: Kind) -> tuple[tuple[Size, Tint], ...]:
    """1 to 6 variants that differ in size only, in tint only, or stand on a grid of both."""
    wanted = 1 + dice.weighted(_VARIANT_WEIGHTS)
    sizes, tints = list(kind.sizes), list(PALETTES[kind.palette])
    dice.shuffle(sizes)
    dice.shuffle(tints)
    axis = dice.unit()
    if axis < 0.42:
        grid = [(size, tints[0]) for size in sizes]
    elif axis < 0.84:
        grid = [(sizes[0], tint) for tint in tints]
    else:
        grid = [(size, tint) for tint in tints[:3] for size in sizes[:2]]
    return tuple(grid[:wanted])
