"""Clothes, shoes, bags and watches."""

from dist_train.synthetic.canvas import Canvas, lit, mix
from dist_train.synthetic.labels import label
from dist_train.synthetic.looks import Look


def shirt(c: Canvas, look: Look) -> None:
    left = [(400, 150), (290, 190), (110, 370), (230, 470), (290, 410), (285, 900)]
    c.polygon([*left, *[(1000 - x, y) for x, y in reversed(left)]], look.body, "soft")
    c.ellipse((395, 100, 605, 215), lit(look.body, 0.6))
    c.line([(400, 152), (500, 222), (600, 152)], lit(look.body, 0.82), 20, smooth=True)
    c.art((365, 330, 635, 640), label(look, 1.15, stamped=False), "soft", 16)
    c.art((470, 165, 530, 205), label(look, 0.7))


def hoodie(c: Canvas, look: Look) -> None:
    left = [(390, 170), (270, 220), (130, 760), (240, 800), (310, 500), (300, 890)]
    c.polygon([*left, *[(1000 - x, y) for x, y in reversed(left)]], look.body, "soft")
    c.blob([(360, 230), (400, 90), (500, 60), (600, 90), (640, 230)], lit(look.body, 0.82), "soft")
    c.ellipse((415, 110, 585, 235), lit(look.body, 0.5))
    c.polygon([(360, 640), (640, 640), (690, 800), (310, 800)], lit(look.body, 0.86), "soft")
    for x in (465, 535):
        c.line([(x, 220), (x - 4, 400)], (240, 238, 232), 9)
    c.art((390, 410, 610, 590), label(look, 0.82), "soft", 12)


def shoe(c: Canvas, look: Look) -> None:
    c.blob(
        [(200, 330), (330, 290), (420, 350), (440, 480), (210, 520)], lit(look.body, 0.6), "soft"
    )
    upper = [(140, 400), (190, 310), (240, 400), (360, 430), (450, 350), (570, 510), (790, 600)]
    c.blob([*upper, (895, 700), (870, 780), (140, 780)], look.body, "soft")
    c.blob([(120, 760), (480, 770), (880, 740), (900, 830), (500, 850), (120, 840)],
           (244, 242, 236), "slope")  # fmt: skip
    c.line([(130, 806), (890, 790)], look.accent, 12)
    c.blob([(138, 430), (215, 470), (230, 640), (132, 720)], lit(look.body, 0.75), "soft")
    swoosh = [(300, 700), (430, 560), (480, 640), (660, 650)]
    c.line(swoosh, look.accent, 34 + look.turn % 20, smooth=True)
    for step in range(4):
        x, y = 400 + 48 * step, 415 + 44 * step
        c.line([(x, y), (x + 74, y - 24)], (250, 250, 248), 13)
    c.art((240, 500, 370, 590), label(look, 0.7), radius=8)


def sandal(c: Canvas, look: Look) -> None:
    for shift in (0, 330):
        sole = [(230, 160), (340, 180), (380, 400), (340, 640), (360, 860), (240, 920), (150, 840)]
        points = [(x + shift, y) for x, y in [*sole, (170, 600), (140, 350)]]
        c.blob(points, lit(look.body, 0.7), "soft")
        c.blob(
            [(x * 0.94 + 18 + shift * 0.06, y * 0.96 + 20) for x, y in points], look.body, "soft"
        )
        x = 255 + shift
        for side in (-110, 115):
            path = [(x, 270), (x + side * 0.6, 350), (x + side, 500)]
            c.line(path, look.accent, 40, smooth=True)
        c.art((x - 60, 700, x + 60, 820), label(look, 1.0), radius=20)


def bag(c: Canvas, look: Look) -> None:
    strap = [(230, 440), (260, 180), (500, 70), (740, 180), (770, 440)]
    c.line(strap, lit(look.body, 0.62), 30, smooth=True)
    c.block((160, 400, 840, 890), look.body, "soft", 60)
    flap = 560 + look.turn % 120
    c.blob([(150, 400), (500, 385), (850, 400), (830, flap), (500, flap + 70), (170, flap)],
           lit(look.body, 0.88), "soft")  # fmt: skip
    c.block((455, flap + 10, 545, flap + 90), (210, 176, 90), "metal", 14)
    c.art((390, 440, 610, 560), label(look, 0.55), radius=8)


def backpack(c: Canvas, look: Look) -> None:
    c.line([(410, 180), (430, 80), (570, 80), (590, 180)], lit(look.body, 0.6), 30, smooth=True)
    for x in (180, 820):
        c.block((x - 50, 420, x + 50, 800), lit(look.body, 0.7), "soft", 50)
    c.block((200, 140, 800, 920), look.body, "soft", 150)
    c.block((260, 540, 740, 880), mix(look.body, look.accent, 0.35), "soft", 50)
    c.line([(250, 460), (500, 430), (750, 460)], lit(look.body, 0.55), 12, smooth=True)
    c.line([(290, 590), (710, 590)], (214, 214, 210), 8)
    c.art((370, 640, 630, 820), label(look, 0.7), radius=10)
    c.art((420, 250, 580, 370), label(look, 0.75, stamped=False), radius=10)


def cap(c: Canvas, look: Look) -> None:
    c.blob([(180, 600), (220, 330), (480, 210), (720, 330), (770, 600), (480, 640)],
           look.body, "round")  # fmt: skip
    c.blob([(380, 590), (760, 560), (930, 690), (800, 740), (520, 690)], look.accent, "soft")
    for x in (340, 480, 620):
        c.line([(480, 220), (x, 420), (x * 1.1 - 50, 600)], lit(look.body, 0.8), 5, smooth=True)
    c.ellipse((455, 195, 505, 235), look.accent)
    c.art((390, 360, 610, 540), label(look, 0.82), "soft", 20)


def sock(c: Canvas, look: Look) -> None:
    for shift in (0, 190):
        leg = [(230, 150), (430, 150), (430, 560), (600, 730), (590, 850), (440, 880), (250, 720)]
        points = [(x + shift, y) for x, y in leg]
        c.blob(points, lit(look.body, 1 - shift / 900), "soft")
        c.block((228 + shift, 140, 432 + shift, 230), look.accent, "soft", 14)
        c.ellipse((490 + shift, 750, 610 + shift, 870), look.accent, "soft")
        for band in range(look.turn % 4):
            y = 290 + 70 * band
            c.line([(236 + shift, y), (428 + shift, y)], look.cap, 18)
    c.art((270, 400, 590, 560), label(look, 0.5), radius=8)


def watch(c: Canvas, look: Look) -> None:
    c.polygon([(400, 60), (600, 60), (640, 400), (360, 400)], look.body, "round")
    c.polygon([(360, 600), (640, 600), (600, 950), (400, 950)], look.body, "round")
    c.ellipse((270, 270, 730, 730), (196, 196, 200), "metal")
    c.block((720, 470, 765, 530), (176, 176, 180), "metal", 8)
    c.ellipse((305, 305, 695, 695), look.paper)
    c.art((400, 400, 600, 480), label(look, 0.4, stamped=False))
    for x, y in ((500, 330), (670, 500), (500, 670), (330, 500)):
        c.ellipse((x - 12, y - 12, x + 12, y + 12), look.ink)
    c.line([(500, 500), (500 + look.turn % 90, 380)], look.ink, 15)
    c.line([(500, 500), (620, 560 - look.turn % 60)], look.ink, 10)
    c.art((440, 570, 560, 640), label(look, 0.58))
