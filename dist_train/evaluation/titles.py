"""Titles as people read them."""

import re

ESCAPES = re.compile(r"(?:\\x[0-9a-fA-F]{2})+")


def decode_escapes(title: str) -> str:
    """Turn literal backslash-x escapes into the UTF-8 characters they stand for.

    Catalogues exported through a printed byte string hold them. Bytes that are no UTF-8, such
    as an emoji cut in half, stay as they are written (their digits in lower case).
    """
    return ESCAPES.sub(
        lambda run: bytes.fromhex(run[0].replace("\\x", "")).decode(errors="backslashreplace"),
        title,
    )
