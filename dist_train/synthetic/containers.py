"""Bottles, jars, tubes and other things that are poured or squeezed."""

from dist_train.synthetic.canvas import Canvas, lit, mix
from dist_train.synthetic.labels import label
from dist_train.synthetic.looks import Look

GLASS = (206, 222, 226)


def bottle(c: Canvas, look: Look) -> None:
    wide = 150 + look.turn % 60
    shoulder = [(430, 190), (430, 250), (500 - wide, 360), (500 - wide, 900), (520 - wide, 930)]
    mirrored = [(1000 - x, y) for x, y in reversed(shoulder)]
    c.polygon([*shoulder, *mirrored], look.body, "round")
    c.block((415, 80, 585, 215), look.cap, "round", 18)
    c.art((500 - wide, 430, 500 + wide, 850), label(look, 420 / (2 * wide)), "round")


def pump(c: Canvas, look: Look) -> None:
    wide = 165 + look.turn % 50
    c.block((485, 130, 515, 290), lit(look.cap, 0.8), "round")
    c.polygon([(380, 100), (590, 85), (590, 150), (440, 150), (380, 130)], look.cap, "slope")
    c.block((435, 230, 565, 320), look.cap, "round", 14)
    c.block((500 - wide, 310, 500 + wide, 930), look.body, "round", 60)
    c.art((500 - wide, 420, 500 + wide, 860), label(look, 440 / (2 * wide)), "round")


def spray(c: Canvas, look: Look) -> None:
    """A perfume bottle of thick glass."""
    c.block((420, 120, 580, 300), look.cap, "metal", 10)
    c.block((455, 290, 545, 350), (206, 190, 150), "metal")
    c.block((270, 345, 730, 910), mix(GLASS, look.body, 0.35), "soft", 50)
    c.block((310, 420, 690, 870), mix(look.accent, GLASS, 0.35), "soft", 30)
    c.art((360, 500, 640, 790), label(look, 1.03), radius=8)
    c.gloss((290, 370, 320, 860), 0.5, 14)


def dropper(c: Canvas, look: Look) -> None:
    c.block((445, 70, 555, 230), (40, 38, 40), "round", 50)
    c.block((425, 220, 575, 340), look.cap, "metal", 8)
    glass = mix((116, 66, 28), look.body, 0.4)
    c.block((340, 350, 660, 920), glass, "round", 60)
    c.art((342, 470, 658, 850), label(look, 1.2), "round")
    c.gloss((372, 380, 396, 890), 0.35, 10)


def jar(c: Canvas, look: Look) -> None:
    c.block((200, 400, 800, 860), look.body, "round", 90)
    c.block((190, 270, 810, 430), look.cap, "round", 30)
    c.ellipse((196, 236, 804, 312), lit(look.cap, 1.2), "slope")
    c.art((202, 480, 798, 800), label(look, 0.54), "round")


def tube(c: Canvas, look: Look) -> None:
    c.block((400, 810, 600, 940), look.cap, "round", 16)
    c.polygon([(310, 90), (690, 90), (640, 820), (360, 820)], look.body, "round")
    c.art((355, 190, 645, 760), label(look, 1.97), "soft")
    c.block((308, 70, 692, 120), lit(look.body, 0.9), "foil")


def can(c: Canvas, look: Look) -> None:
    c.ellipse((250, 830, 750, 930), (150, 152, 156), "metal")
    c.block((250, 170, 750, 880), look.body, "round", 12)
    c.art((250, 230, 750, 850), label(look, 1.24), "round")
    c.ellipse((250, 110, 750, 220), (196, 198, 202), "metal")
    c.ellipse((275, 122, 725, 205), look.cap, "slope")


def tumbler(c: Canvas, look: Look) -> None:
    c.polygon([(330, 260), (670, 260), (640, 940), (360, 940)], look.body, "metal")
    c.block((315, 180, 685, 290), look.cap, "round", 24)
    c.line([(520, 190), (535, 60), (600, 40)], lit(look.accent, 0.9), 26)
    c.art((375, 450, 625, 760), label(look, 1.24), "soft", 14)


def nipple(c: Canvas, look: Look) -> None:
    """A baby's bottle with its scale."""
    c.blob([(455, 220), (470, 120), (500, 70), (530, 120), (545, 220)], (226, 190, 150), "round")
    c.block((385, 210, 615, 320), look.body, "round", 20)
    c.block((370, 315, 630, 920), mix(GLASS, look.body, 0.15), "round", 70)
    c.block((385, 520, 615, 900), (246, 243, 234), "round", 50)
    for step in range(6):
        c.line([(560, 430 + 70 * step), (610, 430 + 70 * step)], look.body, 7)
    c.art((385, 480, 545, 800), label(look, 2.0), radius=14)


def gable(c: Canvas, look: Look) -> None:
    """A milk carton with a folded top."""
    c.polygon([(260, 330), (600, 330), (600, 930), (260, 910)], look.body, "slope")
    c.polygon([(600, 330), (760, 300), (760, 880), (600, 930)], look.body, "side")
    c.polygon([(260, 330), (600, 330), (640, 150), (320, 160)], lit(look.accent, 0.95), "slope")
    c.polygon([(600, 330), (760, 300), (640, 150)], lit(look.accent, 0.7))
    c.polygon([(320, 160), (640, 150), (640, 90), (320, 100)], look.cap, "slope")
    c.art((262, 340, 598, 905), label(look, 1.68))


def cup(c: Canvas, look: Look) -> None:
    c.polygon([(240, 220), (760, 220), (660, 900), (340, 900)], look.body, "round")
    c.art((330, 330, 670, 800), label(look, 1.38), "soft", 20)
    c.ellipse((226, 160, 774, 270), look.cap, "slope")
    c.ellipse((250, 172, 750, 256), (232, 230, 224), "foil")


def mug(c: Canvas, look: Look) -> None:
    handle = [(690, 380), (850, 380), (880, 560), (800, 700), (680, 720)]
    c.line(handle, lit(look.body, 0.82), 56, smooth=True)
    c.block((220, 250, 720, 860), look.body, "round", 50)
    c.ellipse((220, 205, 720, 305), lit(look.body, 1.25), "slope")
    c.ellipse((245, 220, 695, 294), lit(look.body, 0.6), "slope")
    c.art((320, 380, 620, 720), label(look, 1.13, stamped=False), "soft", 20)
