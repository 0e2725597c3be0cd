"""What titles state: its kinds and units, and the words that it is written in."""

import math
import re
from enum import IntEnum
from typing import NamedTuple

KINDS = {
    **{"mass": "g", "volume": "ml", "length": "cm", "dimensions": "cm", "storage": "GB"},
    **{"ram": "GB", "power": "W", "voltage": "V", "current": "A", "charge": "mAh"},
    **{"frequency": "GHz", "horsepower": "PK", "screen": "inch", "megapixel": "MP"},
    **{"percent": "%", "spf": "", "age": "months", "layers": "", "grammage": "g/m²", "count": ""},
    **{"clothing_size": "", "number_size": "", "colour": "", "model": "", "number": ""},
}
"""What titles state, and its base unit."""


class Role(IntEnum):
    PLAIN = 0
    SINGLE = 1
    """One piece of a multipack: the 200 ml of "3x200ml"."""
    TOTAL = 2
    """All pieces of a multipack together."""
    RANGE = 3
    """From low to high: "0-6 bulan", "size 37-40"."""
    WEAK = 4
    """A guess that may agree with a stated value and contradicts none: iphone12 of "iPhone 12"."""


class Quantity(NamedTuple):
    """One value: an interval (tolerance of imperial units, ranges), or a name.

    Of dimensions one interval a side, longest first; an unwritten third side is (0, inf). Names,
    of colours and model numbers, have no interval.
    """

    kind: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    name: str = ""
    role: Role = Role.PLAIN

    def __str__(self) -> str:
        """For people: "mass 250 g", "clothing_size S-XL"."""
        ends = [self.low, self.high] if self.role == Role.RANGE else [self._middle()]
        texts = [" x ".join(map(self._format, end)) for end in ends]
        return f"{self.kind} {self.name or '-'.join(texts)} {KINDS[self.kind]}".rstrip()

    def _middle(self) -> tuple[float, ...]:
        pairs = zip(self.low, self.high, strict=True)
        return tuple((low + high) / 2 for low, high in pairs if high < math.inf)

    def _format(self, value: float) -> str:
        if self.kind == "clothing_size":
            return CLOTHING_SIZES[int(value)]
        return f"{value:.6g}"


class Unit(NamedTuple):
    """What one of it is in the base unit of its kind; values may be off by a share `tolerance`."""

    kind: str
    factor: float
    tolerance: float
    thousands: bool
    """A point before three digits separates thousands ("2.500 gr"); it is decimal otherwise."""


# Kind, factor, tolerance, spellings. Large units, of which nobody sells thousands, are marked with
# a *. Kind "" is understood and means nothing: hours of opening. Those with a ? depend on context.
_UNIT_TABLE = """
mass        1         0     g gr grm gm gram grams
mass        1000      0   * kg kgs kilo kilogram kilograms
mass        0.001     0     mg milligram miligram
mass        100       0   * ons
mass        28.3495   0.01* oz ounce ounces
mass        453.592   0.01* lb lbs pound pounds
volume      1         0     ml mili milliliter mililiter cc
volume      10        0     cl
volume      1000      0   * l lt ltr liter liters litre litres
volume      29.5735   0.01* fl_oz fl.oz fl._oz floz
volume      946.353   0.01* quart quarts qt
volume      3785.41   0.01* gallon gallons
volume      28316.8   0.01* cu_ft cu.ft cu._ft cu_._ft
length      0.1       0     mm milimeter millimeter
length      1         0     cm centi senti centimeter sentimeter
length      100       0   * m mtr meter meters metre metres
length      30.48     0.01* ft foot feet
length      91.44     0.01* yard yards yd
inch        2.54      0.01* inch inches inci inchi in " '
storage     1         0   * gb giga gigabyte
storage     1012      0.012* tb
storage     0.0009765625 0  mb
power       1         0     w watt watts
power       1000      0   * kw
voltage     1         0   * v volt volts
current     1         0   * a amp ampere
charge      1         0     mah
charge      1000      0   * ah
frequency   1         0   * ghz
frequency   0.001     0   * mhz
frequency   0.000001  0     khz
frequency   0.000000001 0   hz
horsepower  1         0   * pk
megapixel   1         0.025* mp megapixel megapixels mega_pixel mega_pixels
percent     1         0   * % persen percent
age         1         0   * bulan bln month months
age         12        0   * tahun thn th yr yrs year years
layers      1         0   * ply susun tingkat lapis tier tiers
grammage    1         0     gsm
count       1         0     pcs pc pce piece pieces buah bh biji bj butir lembar lbr sheet sheets
count       1         0     helai tablet tablets tab kapsul kaplet caps capsule capsules softgel
count       1         0     sachet sachets saset pasang pair pairs kantong batang btg keping ekor
count       1         0     unit buku roll rol warna colors colours potong tangkai 's s
count       12        0     lusin lsn dozen
count       20        0     kodi
count       144       0     gross
count       500       0     rim
container   1         0     box pack packs pak dus karton kotak bungkus bks botol btl bottle bottles
container   1         0     kaleng toples strip pouch bal slop renceng carton set jar tube can cans
""            1         0     jam hari menit
"""


def _units() -> dict[str, Unit]:
    units = {}
    for row in _UNIT_TABLE.strip().splitlines():
        kind, factor, tolerance, *names = row.replace("*", " * ").split()
        large = names[0] == "*"
        unit = Unit(kind.strip('"'), float(factor), float(tolerance), not large)
        units |= {name.replace("_", " "): unit for name in names[large:]}
    return units


UNITS = _units()

CLOTHING_SIZES = ("NB", "XXS", "XS", "S", "M", "L", "XL", *(f"{n}XL" for n in range(2, 10)))
"""In order: a clothing size is its place in this list."""
SIZE_WORDS = {
    **{name.lower(): place for place, name in enumerate(CLOTHING_SIZES)},
    **{"x" * n + "l": 5 + n for n in range(2, 6)},
    **{"small": 3, "medium": 4, "large": 5},
}

_SPECIFICATIONS = """
480p 720p 1080p 1080i 1440p 2160p 2g 3g 4g 5g 2d 3d mp3 mp4 h264 ddr ddr2 ddr3 ddr4 ddr5 gddr5
gddr6 2x 3x 4x 5x 8x 10x 1st 2nd 3rd 4th 5th 6th 7th 8th 9th 10th
"""
SPECIFICATIONS = frozenset(_SPECIFICATIONS.split())
"""Letters with digits that many products share: no model numbers."""

_COLOUR_TABLE = """
black        hitam htm black
white        putih pth white
red          merah mrh red
pink         merah_muda merah_jambu pink
blue         biru bru blue
light blue   biru_muda biru_langit light_blue sky_blue baby_blue
navy         navy dongker biru_dongker biru_navy navy_blue blue_navy
dark blue    biru_tua dark_blue
green        hijau hjau green
light green  hijau_muda light_green
dark green   hijau_tua dark_green
turquoise    tosca toska hijau_tosca hijau_toska turquoise
army         army hijau_army army_green olive olive_green hijau_olive
yellow       kuning kng yellow
orange       orange oranye oren jingga
purple       ungu purple violet
lilac        lilac lilak ungu_muda
grey         abu abu_abu grey gray
dark grey    abu_tua dark_grey dark_gray
light grey   abu_muda light_grey light_gray
brown        coklat cokelat coklt brown
cream        krem cream
beige        beige
khaki        khaki
maroon       maroon marun merah_maroon merah_marun maron
gold         emas gold golden
rose gold    rose_gold rosegold
silver       silver perak
mustard      mustard
magenta      magenta fuchsia fanta
salmon       salem salmon
mocha        mocca mocha moka
transparent  bening transparan transparent
"""
COLOURS = {
    spelling.replace("_", " "): row[:13].strip()
    for row in _COLOUR_TABLE.strip().splitlines()
    for spelling in row[13:].split()
}

CONTEXTS = {
    name: re.compile(rf"\b(?:{words})\b")
    for name, words in {
        "screen": r"tv|hdtv|monitor|layar|lcd|led|oled|plasma|laptop|notebook|macbook|tablet|tab|"
        r"ipad|display|screen|portable dvd|bravia|projection",
        "phone": r"hp|handphone|android|smartphone|lte|gb|\d+gb|modem|router|wifi|mifi|samsung|"
        r"xiaomi|redmi|oppo|vivo|realme|iphone|infinix|nokia|galaxy|sim",
        "memory": r"flash ?dis[kc]|flash ?drive|memori|memory|micro ?sd|sd ?card|ssd|hard ?dis[kc]|"
        r"hdd|usb|otg|fd|ram|rom|laptop",
        "wireless": r"wireless|wifi|mouse|keyboard|router|drone|remote|cordless|bluetooth",
        "current": r"adapt[oe]r|charger|cas|mcb|power supply|\d+ ?v|\d+ ?volt|kabel|cable",
        "child": r"bayi|baby|anak|balita|umur|usia|ages?|kids?|toys?|mainan|susu|toddler|infant|"
        r"newborn|formula|boys?|girls?",
        "clothing": r"kaos|kaus|baju|celana|jaket|jacket|dress|gamis|t ?-?shirt|shirts?|kemeja|"
        r"hoodie|legging|daster|piyama|rok|jersey|sweater|cardigan|blouse|blus|pants|jeans|bra|"
        r"hijab|jilbab|kerudung|rompi|sarung|singlet|boxer|tunik|outer|koko|batik|blazer|helm|"
        r"wearpack|popok|pampers|diapers?",
        "shoe": r"sepatu|spatu|sandal|sendal|shoes?|sneakers?|boots?|heels|flatshoes|pantofel|nike|"
        r"adidas|jeans|celana|slop|selop|wedges|running",
        "diaper": r"popok|pampers|diapers?|mamypoko|merries|sweety|makuku|pospak",
        "power bank": r"power ?bank|baterai|battery|batre",
        "named colour": r"warna|wrn|colou?r",
    }.items()
}
