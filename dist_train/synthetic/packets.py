"""Boxes, pouches, sacks and what else is printed all over."""

from dist_train.synthetic.canvas import Canvas, lit, mix
from dist_train.synthetic.labels import label
from dist_train.synthetic.looks import Look


def box(c: Canvas, look: Look) -> None:
    wide = 150 + look.turn % 90
    left, right, deep = 430 - wide, 430 + wide, 150
    c.polygon([(left, 230), (right, 230), (right + deep, 170), (left + deep, 170)],
              lit(look.body, 1.2), "slope")  # fmt: skip
    c.polygon([(right, 230), (right + deep, 170), (right + deep, 850), (right, 930)],
              mix(look.body, look.accent, 0.3), "side")  # fmt: skip
    c.polygon([(left, 230), (right, 230), (right, 930), (left, 930)], look.body)
    c.art((left, 230, right, 930), label(look, 700 / (2 * wide)), "slope")


def pouch(c: Canvas, look: Look) -> None:
    outline = [(230, 130), (770, 130), (750, 480), (800, 900), (500, 930), (200, 900), (250, 480)]
    c.blob(outline, look.body, "foil")
    c.block((228, 90, 772, 170), lit(look.body, 0.9), "foil", 8)
    c.line([(240, 186), (760, 186)], lit(look.body, 0.75), 6)
    c.art((270, 230, 730, 850), label(look, 1.35), "foil", 30)


def sachet(c: Canvas, look: Look) -> None:
    c.block((250, 120, 750, 900), look.body, "foil", 6)
    c.art((270, 190, 730, 830), label(look, 1.39), "foil")
    for y in (130, 840):
        for step in range(5):
            c.line([(254, y + 12 * step), (746, y + 12 * step)], lit(look.body, 0.8), 3)


def sack(c: Canvas, look: Look) -> None:
    body = mix((238, 232, 216), look.body, 0.15)
    side = [(250, 170), (220, 500), (190, 880), (500, 935)]
    c.blob([*side, (810, 880), (780, 500), (750, 170), (500, 190)], body, "soft")
    c.polygon([(250, 180), (320, 70), (680, 70), (750, 180)], lit(body, 0.92), "foil")
    c.line([(270, 172), (730, 172)], look.accent, 16)
    c.art((280, 280, 720, 820), label(look, 1.23), "soft", 20)


def puzzle(c: Canvas, look: Look) -> None:
    """A wooden board with pieces in their holes."""
    c.block((130, 200, 870, 860), (214, 176, 124), "slope", 30)
    c.art((170, 240, 830, 360), label(look, 0.3), radius=10)
    tones = (look.body, look.accent, (244, 204, 48), (48, 140, 76), (200, 60, 60))
    for row in range(3):
        for column in range(5):
            x, y = 190 + 128 * column, 385 + 152 * row
            tone = tones[(row * 5 + column + look.turn) % 5]
            c.block((x, y, x + 108, y + 132), tone, "slope", 16)
            c.ellipse((x + 38, y + 50, x + 70, y + 82), lit(tone, 1.4))


def notebook(c: Canvas, look: Look) -> None:
    c.polygon([(250, 140), (790, 120), (800, 890), (260, 910)], (246, 244, 236), "side")
    c.block((230, 110, 770, 890), look.body, "slope", 16)
    c.art((310, 210, 730, 780), label(look, 1.36), radius=10)
    for step in range(16):
        y = 140 + 46 * step
        c.line([(215, y), (262, y + 6)], (96, 98, 104), 9)


def towel(c: Canvas, look: Look) -> None:
    for fold in range(4):
        top = 330 + 130 * fold
        c.block((150, top, 850, top + 150), lit(look.body, 1.05 - 0.07 * fold), "soft", 70)
        c.line([(170, top + 108), (830, top + 108)], mix(look.body, look.accent, 0.6), 14)
    c.art((380, 470, 620, 690), label(look, 0.92), radius=8)


def cushion(c: Canvas, look: Look) -> None:
    outline = [(150, 180), (500, 215), (850, 180), (815, 520), (850, 870), (500, 835), (150, 870)]
    c.blob([*outline, (185, 520)], look.body, "soft")
    c.art((270, 300, 730, 750), label(look, 0.98, stamped=False), "soft", 40)
    c.line([(200, 240), (500, 262), (800, 240)], lit(look.body, 0.8), 5, smooth=True)


def scarf(c: Canvas, look: Look) -> None:
    """A headscarf draped over a stand."""
    drape = [(500, 110), (690, 210), (740, 420), (850, 880), (500, 930), (150, 880), (260, 420)]
    c.blob([*drape, (310, 210)], look.body, "soft")
    c.ellipse((385, 220, 615, 520), (232, 200, 172), "round")
    for step in range(5):
        x = 260 + 120 * step
        fold = [(440 + 30 * step, 540), (x + 20, 700), (x, 900)]
        c.line(fold, lit(look.body, 0.84), 9, smooth=True)
    c.art((420, 640, 580, 790), label(look, 0.94), radius=6)
