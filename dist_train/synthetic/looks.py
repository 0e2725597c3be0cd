"""How a product looks: its colours, pattern, layout and words, drawn from its line."""

from typing import NamedTuple

from dist_train.synthetic.brands import tone
from dist_train.synthetic.canvas import RGB, lit, mix
from dist_train.synthetic.products import Product
from dist_train.synthetic.randomness import Dice
from dist_train.synthetic.sizes import stamp

PATTERNS = ("plain", "stripes", "dots", "waves", "rays", "diamonds", "leaves", "halves", "checks")
LAYOUTS = ("centred", "banner", "medallion", "column", "diagonal")


class Look(NamedTuple):
    """What every picture of a product shares; variants of a line differ in tint or stamp."""

    body: RGB
    accent: RGB
    cap: RGB
    paper: RGB
    ink: RGB
    pattern: str
    layout: str
    mark: str
    face: str
    turn: int
    brand: str
    name: str
    kind: str
    feature: str
    stamp: str


def look_of(product: Product) -> Look:
    """The look of a product; a pure function of its line and variant."""
    line, tint = product.line, product.tint.rgb
    dice = Dice(line.seed, "look", line.number)
    house = line.brand.house
    # What is worn or used has the tint all over; what is packed shows it on the pack.
    body = tint if line.kind.palette == "colour" else mix(_body(dice, house), tint, 0.25)
    paper = dice.pick(((250, 249, 244), mix(house, (255, 255, 255), 0.82), house, tint))
    accent = tint if line.kind.palette != "colour" else tone(dice, (0.3, 0.7), (0.4, 0.9))
    return Look(
        *(body, accent, _cap(dice, house, accent), paper, _ink(paper, dice, house)),
        *(dice.pick(PATTERNS), dice.pick(LAYOUTS), line.brand.mark, line.brand.face),
        *(dice.below(1000), line.brand.name, line.name, dice.pick(line.kind.english)),
        *(line.features[0][1], stamp(product.size)),
    )


def _body(dice: Dice, house: RGB) -> RGB:
    pale = ((246, 245, 240), (226, 232, 236), (70, 52, 40), mix(house, (255, 255, 255), 0.6))
    return dice.pick((*pale, house, house, tone(dice, (0.35, 0.75), (0.3, 0.9))))


def _cap(dice: Dice, house: RGB, accent: RGB) -> RGB:
    return dice.pick(((244, 244, 242), (40, 40, 44), (200, 164, 84), house, lit(accent, 0.8)))


def _ink(paper: RGB, dice: Dice, house: RGB) -> RGB:
    """A colour that can be read on the paper."""
    light = (paper[0] * 3 + paper[1] * 6 + paper[2]) / 10
    if light < 140:
        return dice.pick(((255, 255, 255), (255, 246, 200)))
    return dice.pick((lit(house, 0.45), (30, 30, 36), lit(house, 0.6)))
