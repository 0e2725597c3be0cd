"""Colours, scents and flavours: what else two variants of a line may differ in."""

from typing import NamedTuple


class Tint(NamedTuple):
    """One colour (or scent, or flavour) with its names in titles and its paint on the pack."""

    indonesian: str
    english: str
    short: str
    rgb: tuple[int, int, int]


COLOURS = (
    Tint("hitam", "black", "htm", (38, 38, 42)),
    Tint("putih", "white", "pth", (236, 234, 228)),
    Tint("merah", "red", "mrh", (200, 36, 44)),
    Tint("merah muda", "pink", "pink", (240, 150, 176)),
    Tint("biru", "blue", "bru", (44, 92, 184)),
    Tint("biru muda", "sky blue", "biru langit", (130, 190, 230)),
    Tint("biru dongker", "navy", "navy", (28, 40, 84)),
    Tint("hijau", "green", "hjau", (48, 140, 76)),
    Tint("hijau tosca", "turquoise", "tosca", (54, 178, 170)),
    Tint("hijau army", "olive", "army", (96, 102, 60)),
    Tint("kuning", "yellow", "kng", (244, 204, 48)),
    Tint("oranye", "orange", "orange", (240, 130, 36)),
    Tint("ungu", "purple", "ungu", (124, 70, 160)),
    Tint("abu abu", "grey", "abu", (142, 146, 150)),
    Tint("coklat", "brown", "coklt", (118, 74, 44)),
    Tint("krem", "cream", "cream", (232, 214, 178)),
    Tint("marun", "maroon", "maroon", (118, 28, 44)),
    Tint("emas", "gold", "gold", (206, 166, 72)),
)

SCENTS = (
    Tint("mawar", "rose", "rose", (226, 120, 150)),
    Tint("lavender", "lavender", "lvndr", (160, 136, 206)),
    Tint("jeruk nipis", "lime", "lime", (150, 200, 70)),
    Tint("lemon", "lemon", "lmn", (246, 220, 84)),
    Tint("melati", "jasmine", "melati", (238, 236, 206)),
    Tint("laut", "ocean fresh", "ocean", (64, 150, 206)),
    Tint("lidah buaya", "aloe vera", "aloe", (104, 178, 104)),
    Tint("kopi", "coffee", "kopi", (110, 72, 52)),
    Tint("kelapa", "coconut", "coco", (236, 226, 206)),
    Tint("teh hijau", "green tea", "grn tea", (140, 170, 92)),
    Tint("arang", "charcoal", "arang", (60, 60, 66)),
    Tint("sakura", "sakura", "skra", (248, 182, 200)),
)

FLAVOURS = (
    Tint("coklat", "chocolate", "choco", (104, 62, 40)),
    Tint("stroberi", "strawberry", "strawb", (226, 74, 92)),
    Tint("vanila", "vanilla", "vanila", (244, 226, 170)),
    Tint("pisang", "banana", "psg", (248, 216, 90)),
    Tint("matcha", "matcha", "mtcha", (130, 164, 82)),
    Tint("moka", "mocha", "mocca", (150, 106, 76)),
    Tint("keju", "cheese", "cheese", (250, 186, 62)),
    Tint("pedas", "spicy", "pdas", (208, 48, 32)),
    Tint("original", "original", "ori", (196, 160, 110)),
    Tint("jagung bakar", "grilled corn", "jgg bkr", (236, 170, 50)),
    Tint("balado", "balado", "bldo", (188, 56, 40)),
    Tint("madu", "honey", "mdu", (230, 160, 40)),
    Tint("jahe", "ginger", "jhe", (206, 150, 84)),
    Tint("anggur", "grape", "grape", (110, 58, 132)),
)

GRAINS = tuple(tint for tint in COLOURS if tint.english in ("white", "red", "black", "brown"))

PALETTES = {"colour": COLOURS, "grain": GRAINS, "scent": SCENTS, "flavour": FLAVOURS}
