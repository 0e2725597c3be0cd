"""The regular expressions that titles are read with, and how numbers are written."""

import re
import unicodedata

from dist_train.decisions.quantity_units import SIZE_WORDS, UNITS

_NUMBER = r"(?:\d{1,2} [1-9]/(?:2|3|4|5|8)|\d{1,2}/(?:2|3|4|5|8|16|32)(?![\d/])|\d+(?:[.,]\d+)*)"
_FRACTIONS = {"setengah": "1/2", "seperempat": "1/4", "sepertiga": "1/3", "se": "1 "}


def _either(words: list[str]) -> str:
    return "(?:" + "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)) + ")"


_UNIT = _either(list(UNITS))
_LENGTH = _either([name for name, unit in UNITS.items() if unit.kind in ("length", "inch")])
_NOT_LENGTH = _either([n for n, unit in UNITS.items() if unit.kind not in ("length", "inch")])
_PIECE = _either([name for name, unit in UNITS.items() if unit.kind in ("count", "container")])
_START, _END = r"(?<![\w.,])(?<!\d/)(?<![a-z]-)", r"(?![a-z0-9])"
_TO = r"(?:-|s/d|sampai|to|fit to)"
SIZE_LEAD = r"(?<!\w)(?:size|sz|ukuran|uk)\b ?[.:]? ?"
_LETTERS = _either(list(SIZE_WORDS))

_SPELLED = re.compile(
    rf"\b(setengah|seperempat|sepertiga) (?={_UNIT}{_END})|\b(se)(?=lusin|kodi|pasang)"
)
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
    rf"(?:{SIZE_LEAD}|(?<!\w)(?:no|nomor|eu|eur|ring)\b ?[.:]? ?)"
    r"(\d{1,3}(?:[.,]5(?!\d))?(?: ?[-/,&] ?\d{1,3}(?:[.,]5(?!\d))?)*)(?!\w)"
)
DIGIT = re.compile(r"\d")
TOKEN = re.compile(r"\d{2,3}/\d{2,3}-\d\d|[a-z0-9]+(?:[-.][a-z0-9]+)*|\|")
NUMBERED_WORD = re.compile(r"(?=[a-z]*[aeiou])[a-z]{4,}(\d\d?|(?:19|20)\d\d)")
VERSION = re.compile(r"v?(\d+(?:\.\d+)?)")
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
    """The number as written; `thousands` where a point before three digits parts thousands."""
    if "/" in written:
        *whole, part = written.split(" ")
        above, below = part.split("/")
        return (float(whole[0]) if whole else 0.0) + float(above) / float(below)
    *head, tail = re.split("[.,]", written)
    if not head:
        return float(tail)
    if len(head) > 1 and all(len(group) == 3 for group in head[1:]):
        return float("".join(head) + ("" if len(tail) == 3 else ".") + tail)
    grouped = len(head) == 1 and len(tail) == 3 and len(head[0]) <= 3 and head[0][0] != "0"
    return float(head[0] + tail) if thousands and grouped else float(f"{head[-1]}.{tail}")
