"""Titles as people read them."""

import re
import unicodedata
from html import unescape
from html.entities import html5

ESCAPES = re.compile(r"(?:\\x[0-9a-fA-F]{2})+")
ENTITIES = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]*);")
# Zero-width space, word joiner, byte order mark, soft hyphen and marks of direction. The joiners
# U+200C and U+200D stay: Persian, Indic scripts and emoji are spelt with them.
ZERO_WIDTH = dict.fromkeys((0xAD, 0x200B, 0x200E, 0x200F, 0x2060, 0xFEFF))
INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}
# Fillers and variation selectors, which Unicode counts as letters, marks or symbols.
BLANK = {*map(chr, (0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0))}
BLANK |= {*map(chr, (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10)))}


def readable_title(title: str) -> str:
    """The title without what exports do to text: escapes and entities decoded, zero-width left out.

    Literal backslash-x escapes, from catalogues exported through a printed byte string, become the
    UTF-8 characters they stand for; bytes that are no UTF-8, such as an emoji cut in half, stay as
    they are written (their digits in lower case). HTML entities become their characters, also
    those that were escaped twice.
    """
    title = ESCAPES.sub(
        lambda run: bytes.fromhex(run[0].replace("\\x", "")).decode(errors="backslashreplace"),
        title,
    )
    plain = None
    while plain != title:
        plain, title = title, ENTITIES.sub(_character, title)
    return title.translate(ZERO_WIDTH)


def _character(entity: re.Match[str]) -> str:
    # html.unescape takes names without a semicolon as well, as in food&region.
    is_number = entity[0].startswith("&#")
    return unescape(entity[0]) if is_number else html5.get(entity[0][1:], entity[0])


def has_text(title: str) -> bool:
    """Whether anything of a title can be seen: blanks and zero-width characters are no title."""
    return any(
        unicodedata.category(character) not in INVISIBLE and character not in BLANK
        for character in readable_title(title)
    )
