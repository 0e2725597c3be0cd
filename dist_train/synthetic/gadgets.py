"""Electronics, cosmetics cases, toys and tools of the house."""

from math import cos, pi, sin

from dist_train.synthetic.canvas import Canvas, lit, mix
from dist_train.synthetic.labels import label
from dist_train.synthetic.looks import Look

_DARK = (34, 34, 38)
_STEEL = (190, 194, 200)


def phone_case(c: Canvas, look: Look) -> None:
    c.block((290, 80, 710, 930), look.body, "soft", 70)
    c.art((312, 250, 688, 900), label(look, 1.73), "soft", 50)
    c.block((325, 115, 515, 305), lit(look.body, 0.7), "slope", 46)
    for x, y in ((375, 165), (375, 250), (462, 165))[: 2 + look.turn % 2]:
        c.ellipse((x - 36, y - 36, x + 36, y + 36), _DARK)
        c.ellipse((x - 14, y - 16, x + 8, y + 6), (96, 112, 150))


def cable(c: Canvas, look: Look) -> None:
    for ring in range(3):
        r = 200 + 34 * ring
        turns = [pi * step / 18 for step in range(38)]
        points = [(500 + r * sin(turn), 500 - r * cos(turn)) for turn in turns]
        c.line(points, lit(look.body, 1.1 - 0.12 * ring), 26)
    for x, head in ((230, 120), (690, 160)):
        c.line([(x + 40, 720), (x, 800), (x, 830)], look.body, 26, smooth=True)
        c.block((x - 44, 820, x + 44, 900), look.cap, "round", 12)
        c.block((x - 28, 896, x + 28, 840 + head), _STEEL, "metal")
    c.art((390, 400, 610, 600), label(look, 0.91), radius=14)


def power_bank(c: Canvas, look: Look) -> None:
    c.block((290, 90, 710, 920), look.body, "soft", 60)
    for x in (370, 540):
        c.block((x, 100, x + 90, 135), _DARK, radius=6)
    for step in range(4):
        tone = (90, 220, 120) if step <= look.turn % 4 else (110, 112, 116)
        c.ellipse((420 + 46 * step, 180, 440 + 46 * step, 200), tone)
    c.art((330, 260, 670, 840), label(look, 1.7), "soft", 20)


def earbuds(c: Canvas, look: Look) -> None:
    c.blob(
        [(210, 620), (220, 300), (500, 200), (780, 300), (790, 620)], lit(look.body, 0.72), "soft"
    )
    for x in (380, 620):
        c.block((x - 32, 420, x + 32, 650), lit(look.body, 0.95), "round", 30)
        c.ellipse((x - 75, 330, x + 75, 480), look.body, "round")
        c.ellipse((x - 32, 370, x + 32, 440), look.accent)
    c.block((190, 580, 810, 880), look.body, "round", 130)
    c.art((330, 640, 670, 820), label(look, 0.53), "soft", 30)


def flashdisk(c: Canvas, look: Look) -> None:
    c.block((410, 90, 590, 330), _STEEL, "metal", 8)
    for x in (440, 520):
        c.block((x, 140, x + 40, 185), (60, 62, 66))
    c.block((360, 300, 640, 900), look.body, "soft", 60)
    c.ellipse((460, 820, 540, 890), lit(look.body, 0.5))
    c.art((385, 360, 615, 800), label(look, 1.91), "soft", 16)


def mouse(c: Canvas, look: Look) -> None:
    c.line([(500, 200), (520, 110), (640, 60)], _DARK, 18, smooth=True)
    outline = [(500, 160), (650, 200), (710, 400), (730, 650), (660, 870), (500, 930)]
    c.blob([*outline, *[(1000 - x, y) for x, y in outline[-2:0:-1]]], look.body, "round")
    c.line([(500, 170), (500, 460)], lit(look.body, 0.5), 7)
    c.block((474, 250, 526, 380), look.accent, "round", 26)
    c.line([(300, 470), (500, 490), (700, 470)], lit(look.body, 0.6), 7, smooth=True)
    c.art((390, 570, 610, 760), label(look, 0.86), "soft", 24)


def speaker(c: Canvas, look: Look) -> None:
    c.block((150, 280, 850, 820), look.body, "soft", 90)
    for x in (330, 670):
        c.ellipse((x - 145, 380, x + 145, 670), lit(look.body, 0.5))
        c.ellipse((x - 118, 407, x + 118, 643), _DARK, "round")
        c.ellipse((x - 50, 475, x + 50, 575), look.accent, "round")
    c.art((385, 690, 615, 800), label(look, 0.48), radius=8)
    for step in range(4):
        c.ellipse((430 + 42 * step, 315, 452 + 42 * step, 337), look.cap)


def bulb(c: Canvas, look: Look) -> None:
    glow = mix((255, 250, 224), look.body, 0.22)
    c.blob([(400, 560), (270, 380), (350, 150), (500, 90), (650, 150), (730, 380), (600, 560)],
           glow, "round")  # fmt: skip
    c.polygon([(385, 550), (615, 550), (575, 770), (425, 770)], look.body, "round")
    c.art((405, 570, 595, 750), label(look, 0.95), "soft")
    for step in range(4):
        c.block((432, 770 + 36 * step, 568, 800 + 36 * step), _STEEL, "metal", 10)
    c.ellipse((465, 905, 535, 945), _DARK)
    c.gloss((370, 200, 420, 380), 0.45, 24)


def pan(c: Canvas, look: Look) -> None:
    c.line([(640, 640), (900, 900)], mix((92, 60, 40), look.cap, 0.4), 60)
    c.ellipse((110, 150, 740, 780), look.body, "soft")
    c.ellipse((140, 180, 710, 750), lit(look.body, 0.55))
    c.ellipse((180, 220, 670, 710), mix((58, 58, 62), look.accent, 0.2), "soft")
    c.art((310, 370, 540, 560), label(look, 0.83), radius=50)
    c.gloss((235, 330, 265, 560), 0.16, 14)


def umbrella(c: Canvas, look: Look) -> None:
    c.line([(500, 90), (500, 840), (540, 910), (600, 880)], (96, 70, 52), 20, smooth=True)
    for rib in range(6):
        left, right = 80 + 140 * rib, 220 + 140 * rib
        tone = look.body if rib % 2 else mix(look.body, look.accent, 0.45)
        sag = [(right, 560), ((left + right) / 2, 520), (left, 560)]
        mid = 500 + (left - 500) * 0.72, 500 + (right - 500) * 0.72
        c.polygon([(500, 130), (mid[1], 280), *sag, (mid[0], 280)], lit(tone, 0.85 + 0.05 * rib))
    c.art((420, 330, 580, 450), label(look, 0.75), radius=10)


def lipstick(c: Canvas, look: Look) -> None:
    c.polygon([(445, 320), (445, 170), (545, 90), (555, 140), (555, 320)], look.body, "round")
    c.block((430, 310, 570, 480), (214, 180, 96), "metal")
    c.block((400, 470, 600, 920), look.cap, "round", 14)
    c.art((404, 540, 596, 860), label(look, 1.67), "round")
    c.block((690, 560, 860, 920), look.cap, "round", 20)


def compact(c: Canvas, look: Look) -> None:
    c.ellipse((190, 70, 810, 560), look.cap, "soft")
    c.ellipse((235, 105, 765, 525), (214, 226, 232), "foil")
    c.ellipse((160, 470, 840, 930), look.cap, "round")
    c.ellipse((215, 500, 785, 880), mix((236, 200, 168), look.body, 0.35), "soft")
    c.art((380, 610, 620, 770), label(look, 0.67), radius=30)


def car(c: Canvas, look: Look) -> None:
    c.blob([(300, 520), (380, 350), (640, 340), (760, 510), (700, 560), (340, 560)],
           lit(look.body, 0.9), "soft")  # fmt: skip
    for points in ([(360, 510), (410, 395), (510, 390), (510, 510)],
                   [(535, 510), (535, 390), (630, 388), (710, 510)]):  # fmt: skip
        c.polygon(points, (168, 206, 226), "foil")
    c.block((110, 500, 890, 700), look.body, "soft", 70)
    c.line([(120, 650), (880, 650)], look.accent, 22)
    for x in (290, 710):
        c.ellipse((x - 105, 590, x + 105, 800), _DARK, "round")
        c.ellipse((x - 50, 645, x + 50, 745), look.cap, "metal")
    c.ellipse((840, 540, 895, 600), (255, 236, 150))
    c.art((400, 530, 600, 640), label(look, 0.55), radius=12)


def robot(c: Canvas, look: Look) -> None:
    c.line([(500, 180), (500, 80)], _STEEL, 16)
    c.ellipse((465, 45, 535, 115), look.accent, "round")
    c.block((340, 150, 660, 390), look.body, "soft", 50)
    for x in (430, 570):
        c.ellipse((x - 46, 220, x + 46, 312), (252, 252, 240))
        c.ellipse((x - 22, 244, x + 22, 288), look.accent)
    c.line([(430, 350), (570, 350)], _DARK, 12)
    for x in (230, 770):
        c.block((x - 50, 430, x + 50, 700), lit(look.body, 0.8), "round", 40)
        c.ellipse((x - 58, 670, x + 58, 770), look.accent, "round")
    c.block((300, 400, 700, 740), lit(look.body, 0.92), "soft", 40)
    for x in (400, 600):
        c.block((x - 70, 730, x + 70, 930), look.cap, "round", 24)
    c.art((370, 450, 630, 680), label(look, 0.88), radius=20)


def plush(c: Canvas, look: Look) -> None:
    snout = mix(look.body, (255, 244, 226), 0.65)
    for x in (330, 670):
        c.ellipse((x - 90, 90, x + 90, 270), look.body, "round")
        c.ellipse((x - 48, 135, x + 48, 230), snout)
        c.ellipse((x * 1.2 - 200, 740, x * 1.2, 940), look.body, "round")
        c.ellipse((x * 1.3 - 250, 500, x * 1.3 - 50, 740), lit(look.body, 0.9), "round")
    c.ellipse((290, 430, 710, 920), look.body, "round")
    c.ellipse((270, 130, 730, 520), look.body, "round")
    c.ellipse((400, 330, 600, 490), snout, "soft")
    for x in (400, 600):
        c.ellipse((x - 26, 260, x + 26, 312), _DARK)
    c.ellipse((462, 350, 538, 402), _DARK)
    for side in (-1, 1):
        c.polygon([(500, 545), (500 + side * 120, 490), (500 + side * 120, 600)], look.accent)
    c.art((420, 630, 580, 790), label(look, 1.0), radius=30)
