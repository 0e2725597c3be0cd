"""The regular expressions that titles are read with, and what their numbers and units mean."""

import re
import unicodedata
from collections.abc import Callable

from dist_train.decisions.quantity_units import SIZE_WORDS, UNITS, Unit

_NUMBER = r"(?:\d{1,2} [1-9]/(?:2|3|4|5|8)|\d{1,2}/(?:2|3|4|5|8|16|32)(?![\d/])|\d+(?:[.,]\d+)*)"
_FRACTIONS = {"setengah": "1/2", "seperempat": "1/4", "sepertiga": "1/3", "se": "1 "}


def _either(words: list[str]) -> str:
    return "(?:" + "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)) + ")"


_UNIT = _either(list(UNITS))
_LENGTH = _either([name for name, unit in UNITS.items() if unit.kind in ("length", "inch")])
_NOT_LENGTH = _either([n for n, unit in UNITS.items() if unit.kind not in ("length", "inch")])
_PIECE = _either([name for name, unit in UNITS.items() if unit.kind in ("count", "container")])
_LONG_UNIT = _either([name for name in UNITS if len(name) > 1 and name.isalpha()])
_START, _END = r"(?<![\w.,])(?<!\d/)(?<![a-z]-)", r"(?![a-z0-9])"
_TO = r"(?:-|s/d|sampai|to|fit to)"
SIZE_LEAD = r"(?<!\w)(?:size|sz|ukuran|uk)\b ?[.:]? ?"
_LETTERS = _either(list(SIZE_WORDS))

_SPELLED = re.compile(
    rf"\b(setengah|seperempat|sepertiga) (?={_UNIT}{_END})|\b(se)(?=lusin|kodi|pasang)"
)
# A word and a quantity run into one: "marun10.000 mah".
GLUED = re.compile(rf"(?<=[a-z]{{4}})(?={_NUMBER} ?{_LONG_UNIT}{_END})")
SUFFIXED = re.compile(r"((?:[a-z0-9]+-)*[a-z]+\d[a-z0-9]*) ?/ ?([a-z]{1,3})(?!\w)")
KILO = re.compile(r"(?<![\w.,])(\d+) ?k ?(mah)?(?![a-z0-9])")
NOISE = re.compile(
    # Prices.
    r"(?<![a-z])(?:rp|idr|usd|[$€£])\.? ?\d[\d.,]*(?: ?(?:rb|ribu|jt|juta)\b)?"
    r"|(?<![\w.,])\d[\d.,]* ?(?:rb|ribu|jt|juta)\b|[€£$] ?\d[\d.,]*"
    # Dates.
    r"|(?<![\w.-])\d{1,2}([-/.])\d{1,2}\1(?:20)?\d\d(?![\w-])"
    r"|\b(?:exp|expired|kadaluarsa)\b\.? ?:? ?\d{1,4}(?:[-/. ]\d{2,4})*"
    r"|\b(?:promo|sale|harbolnas) (\d{1,2})[./]\2(?!\w)|(?<![\w.])(\d{1,2})[./]\3 (?:promo|sale)\b"
    # Gifts, least orders, warranties, and "3 in 1".
    r"|\b(?:beli|buy|gratis|free|get|bonus|min|minimal|min\.? ?order) \d+(?: ?" + _PIECE + r"\b)?"
    r"|\b(?:garansi|warranty)(?: [a-z]+)? \d+ ?[a-z]*"
    r"|\d+ ?(?:tahun|thn?|years?|bulan|bln) (?:garansi|warranty)\b"
    r"|\d+ ?in ?1(?!\w)"
    # Discounts and assurances.
    r"|\b(?:diskon|disc|discount|sale|promo|cashback|up ?to|hemat|ori|original|asli) \d+ ?%"
    r"|\b\d+ ?% (?:off|ori|original|asli|diskon|disc|cashback)\b(?! ?\d)|\b100 ?%"
    # The gift in "48+4 pcs".
    r"|(?<=\d) ?\+ ?\d{1,2}(?= ?(?:pcs|pc|lembar|sheets|'s)\b)"
)
BOTH_MEMORIES = re.compile(
    rf"{_START}(?:ram ?)?(\d{{1,2}}) ?(?:gb?)? ?[/+] ?(?:rom ?)?(\d{{1,4}}) ?(gb?|tb)?"
    r"(?![\w/]| ?(?:inch|inci|\"))"
)
ONE_MEMORY = re.compile(
    r"\b(?:ram ?|ddr\d\w? )(?P<ram>\d{1,3})(?: ?(?P<ram_unit>[gm]b?))?(?![\w.])"
    r"|\b(?P<before>\d{1,3}) ?(?P<before_unit>[gm]b?) (?:ram|(?:g|lp)?ddr\w*)"
    r"|\b(?:rom|internal) ?(?P<rom>\d{1,4})(?: ?(?P<rom_unit>[gtm]b?))?(?![\w.])"
)
_SIDE = rf"(?:[plt] ?)?({_NUMBER}) ?({_LENGTH}{_END})?"
DIMENSIONS = re.compile(
    rf"{_START}{_SIDE} ?[x*] ?{_SIDE}(?: ?[x*] ?{_SIDE})?(?![\w*]|[.,]\d| ?-? ?{_NOT_LENGTH}{_END})"
)
PACK = re.compile(
    rf"{_START}(?P<n>\d{{1,4}}) ?(?P<outer>{_PIECE})? ?(?:x|@|isi) ?@? ?"
    rf"(?P<one>{_NUMBER}) ?(?P<unit>{_UNIT})?{_END}"
    rf"|{_START}(?P<one_>{_NUMBER}) ?(?P<unit_>{_UNIT}) ?x ?(?P<n_>\d{{1,4}}) ?{_PIECE}?{_END}"
)
DIAPER = re.compile(rf"(?<!\w)({_LETTERS}) ?-? ?(\d\d)(?!\w)")
MEASURE = re.compile(
    rf"(?:(?P<lead>(?<!\w)(?:isi|spf|pack of|set of|box of|ages?|usia|umur)|@) ?[:.]? ?|{_START})"
    rf"(?P<n>{_NUMBER})(?:(?P<to> ?{_TO} ?)(?P<m>{_NUMBER}))?"
    rf"(?: ?-? ?(?P<unit>{_UNIT}){_END}|(?![\w]))"
)
CLOTHING = re.compile(
    rf"(?P<all>\b(?:all|one|free) ?size\b)|(?P<lead>{SIZE_LEAD})?(?<![\w'&+])(?P<first>{_LETTERS})"
    rf"(?: ?{_TO} ?(?P<last>{_LETTERS}))?(?![\w'&+]|[-.]\w)"
)
NUMBERED = re.compile(
    r"(?<!\w)(?:size|sz|ukuran|uk|no|nomor|eu|eur|ring) ?[.:]? ?"
    r"(\d{1,3}(?:[.,]5(?!\d))?(?: ?[-/,&] ?\d{1,3}(?:[.,]5(?!\d))?)*)(?!\w)"
)
DIGIT = re.compile(r"\d")
TOKEN = re.compile(r"\d{2,3}/\d{2,3}(?: ?r|-)\d\d\b|[a-z0-9]+(?:[-.][a-z0-9]+)*|\|")
NUMBERED_WORD = re.compile(r"(?=[a-z]*[aeiou])[a-z]{4,}(\d\d?|(?:19|20)\d\d)")
COUNTED = re.compile(r"\d+(?:\.\d+)?-[a-z]{3,}")  # "5-disc"
VERSION = re.compile(r"v?(\d+(?:\.\d+)?)")
STORAGES = {2**n for n in range(3, 13)}
NOTHING = Unit("", 0.0, 0.0, False)
_TYPOGRAPHY = str.maketrans(
    {"×": "x", "✕": "x", "″": '"', "“": '"', "”": '"', "′": "'", "’": "'", "⁄": "/"}
    | dict.fromkeys("‐‑–—−", "-")
)


def normal(title: str) -> str:
    """Lower case, one space between words, plain punctuation, fractions in figures."""
    if not title.isascii():
        title = re.sub("(?=[¼½¾⅐-⅞])", " ", title)
        title = unicodedata.normalize("NFKC", title).translate(_TYPOGRAPHY)
    text = " ".join(title.lower().replace("''", '"').split())
    text = re.sub(r"(?<=\d) \.(?=\d)", ".", text)  # "v8 .0"
    return _SPELLED.sub(lambda m: _FRACTIONS[m[1] or m[2]] + (" " if m[1] else ""), text)


def number_in(written: str, thousands: bool) -> float:
    """The number as written; `thousands` where a point before three digits separates thousands."""
    if "/" in written:
        *ones, part = written.split(" ")
        above, below = part.split("/")
        return (float(ones[0]) if ones else 0.0) + float(above) / float(below)
    *head, tail = re.split("[.,]", written)
    if not head:
        return float(tail)
    if len(head) > 1 and all(len(group) == 3 for group in head[1:]):
        return float("".join(head) + ("" if len(tail) == 3 else ".") + tail)
    grouped = len(head) == 1 and len(tail) == 3 and len(head[0]) <= 3 and head[0][0] != "0"
    return float(head[0] + tail) if thousands and grouped else float(f"{head[-1]}.{tail}")


def unit_in(match: re.Match[str], about: Callable[[str], bool]) -> Unit | None:
    """The unit of a number; some spellings mean what the rest of the title makes of them."""
    name, lead, n = match["unit"], match["lead"], match["m"] or match["n"]
    ages = lead in ("age", "ages", "usia", "umur")
    if name is None:
        return UNITS["tahun" if ages else "pcs"] if lead else None
    unit = UNITS[name]
    glued = match[0].endswith(n + name)
    if len(name) == 1 and name.isalpha() and match[0][-2] == "-":  # part numbers
        return None
    if name == "g":
        return _gram_or_giga(n, about)
    if name == "'s" and match["m"]:
        return None
    if unit.kind == "storage" and match.string.startswith("/s", match.end()):
        return NOTHING
    if name == "s":
        likely = glued and n.isdigit() and 20 <= int(n) < 1000 and not about("shoe")
        return unit if likely else None
    if name == "w" and re.match("-| ?/", match.string[match.end() :]):  # 10w-40, w/ lens
        return None
    if name == "a":
        return unit if about("current") else None
    if name == "m" and match["m"] and match["n"] == "0" and about("child"):
        return UNITS["bulan"]
    if unit.kind == "inch":
        if about("screen"):
            return Unit("screen", 1.0, 0.008 if number_in(n, False) > 20 else 0.0, False)
        if name == "'":
            return NOTHING
        return unit._replace(kind="length") if glued or name != "in" else None
    if unit.kind == "age" and not (ages or match["m"] or about("child")):
        return NOTHING
    return unit


def _gram_or_giga(n: str, about: Callable[[str], bool]) -> Unit:
    """What G means: the network "5g" of a phone, "16G" of a flash disk, "2.4G" of a mouse."""
    if n in ("2", "3", "4", "5") and about("phone"):
        return NOTHING
    if n in ("2.4", "2,4", "5", "5.8") and about("wireless"):
        return UNITS["ghz"]
    return UNITS["gb" if n.isdigit() and int(n) in STORAGES and about("memory") else "g"]
