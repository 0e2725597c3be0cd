"""Why a photo or a title was not used as it is: the kind, the text that is kept, the remedy.

Kinds are few, so that a catalogue of millions is summed up in a few lines; the text names the file
and what was found there.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import NamedTuple

NOT_FOUND = "file not found"
OUTSIDE = "path leads out of the image folder"
LINK_OUTSIDE = "link leads out of the image folder"
BROKEN_LINK = "link to a file that is not there"
ADDRESS = "address instead of a file"
SEVERAL_NAMES = "several names in one cell"
SEVERAL_FILES = "name fits several files"
FOLDER = "folder instead of a file"
UNUSABLE_PATH = "path cannot be used"
UNREADABLE_FILE = "file cannot be read"
EMPTY = "file of zero bytes"
LARGE_FILE = "file is too large"
MANY_PIXELS = "over max_pixels"
LONG = "longer than a JPEG may be"
LOST_BITS = "16-bit colours of 12 bits or less"
HEIC = "HEIC photo without pillow-heif"
POINTER = "pointer of Git LFS instead of the photo"
LINK_AS_TEXT = "path of a link instead of the photo"
PAGE = "web page instead of a photo"
OTHER_KIND = "unknown kind of photo"
DAMAGED = "damaged photo"
TITLE_CUT = "title cut"
UNSEEN_TITLE = "title without a visible character"
LABEL_LEFT_OUT = "label taken as empty"
NOT_UTF8 = "text that is not UTF-8"
NOTHING = "neither a photo nor a title"
NO_TITLE = "no title, and photos are not packed"

OF_PHOTO = "photo: "
"""What kinds begin with that are about the photo."""
MAX_NAME = 1_000
"""Characters of a photo's name that a remark keeps: cells may hold a complete photo as text."""
REMEDIES = {
    NOT_FOUND: "is --images the folder that the column image starts from, and is it mounted? If "
    "there are no photos, give --no-photos",
    OUTSIDE: "name the photos relative to --images, or give --images a folder above them",
    LINK_OUTSIDE: "give --follow-links if the links of that folder are to be trusted",
    BROKEN_LINK: "fetch the linked files first, as with git annex get or dvc pull",
    ADDRESS: "download the photos, for example with img2dataset, and name the files",
    SEVERAL_NAMES: "a posting has one photo: keep one name in the cell, such as the first",
    SEVERAL_FILES: "write the name in the catalogue as it is on the disk",
    FOLDER: "name the photo in it",
    UNUSABLE_PATH: "correct the name in the catalogue",
    UNREADABLE_FILE: "correct the permissions or the disk",
    EMPTY: "fetch these photos again",
    LARGE_FILE: "save these photos smaller",
    MANY_PIXELS: "raise --max-pixels, which costs memory, or save these photos smaller",
    LONG: "cut these photos to what shows the product",
    LOST_BITS: "save these photos with 8 bits a colour",
    HEIC: "pip install pillow-heif, or save these photos as JPEG",
    POINTER: "git lfs pull fetches the photos",
    LINK_AS_TEXT: "copy the folder again with its links, or with --dereference",
    PAGE: "fetch these photos again: the server answered with a page",
    OTHER_KIND: "save these photos as JPEG, PNG or WebP",
    DAMAGED: "fetch these photos again",
    TITLE_CUT: "raise --max-title if the end of long titles matters",
    NOT_UTF8: "save the text as UTF-8",
}
"""What to do about a kind; a kind without an entry needs nothing."""


class Remark(NamedTuple):
    """What happened to a part of a posting: the kind, and the text that items.parquet keeps."""

    kind: str
    text: str

    def is_of_photo(self) -> bool:
        """Whether it is about the photo."""
        return self.kind.startswith(OF_PHOTO)


class PhotoRefused(ValueError):
    """The photo cannot be used; the message is the reason that items.parquet keeps.

    `kind` is one of the kinds above; without one the message is the kind.
    """

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self.kind = kind or reason


def remark_of_photo(name: str, refused: PhotoRefused) -> Remark:
    """What is kept of a refused photo; of a very long name the first characters."""
    shown = name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}…"
    return Remark(OF_PHOTO + refused.kind, f"photo {shown}: {refused}")


def remark_facts(remarks: list[Remark]) -> dict[str, str]:
    """The `reason` of items.parquet, and `remarks`: (kind, text) of each, as JSON."""
    texts = "; ".join(remark.text for remark in remarks)
    return {"reason": texts, "remarks": json.dumps(remarks, ensure_ascii=False)}


def summary_of(remarks: Iterable[tuple[str, str]]) -> list[str]:
    """A line for every kind of the remarks (kind, example): count, an example and the remedy."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for kind, example in remarks:
        counts[kind] += 1
        examples.setdefault(kind, example)
    lines = []
    for kind, count in counts.most_common():
        remedy = REMEDIES.get(kind.removeprefix(OF_PHOTO))
        lines.append(
            f"{count} × {kind}, for example {examples[kind]}" + (f" ({remedy})" if remedy else "")
        )
    return lines


def unknown_photo(data: bytes, formats: Collection[str]) -> PhotoRefused:
    """What bytes that are none of `formats` are, as far as their start shows."""
    head = bytes(data[:MAX_NAME])
    start, is_boxed = head.lstrip().lower(), head[4:8] == b"ftyp"
    brands = {head[at : at + 4] for at in (8, *range(16, 64, 4))}
    if is_boxed and brands & {b"avif", b"avis"}:
        kind, found = (DAMAGED, "damaged") if "AVIF" in formats else (OTHER_KIND, "AVIF")
    elif is_boxed and brands & {b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"}:
        is_read = "HEIF" in formats
        kind, found = (DAMAGED, "damaged") if is_read else (HEIC, "HEIC, which needs pillow-heif")
    elif start.startswith(b"version https://git-lfs"):
        kind, found = POINTER, "a pointer of Git LFS"
    elif re.match(rb"(<!doctype html|<html|<head|<body|<\?xml[^>]*>\s*<!doctype html)", start):
        kind, found = PAGE, "a web page"
    elif len(data) < MAX_NAME and re.fullmatch(rb"[\x20-\x7e]*/[\x21-\x7e]+\n?", head):
        kind, found = LINK_AS_TEXT, "the path of a link as text"
    else:
        kind, found = OTHER_KIND, f"none of {', '.join(formats)}"
    return PhotoRefused(f"not a readable photo: {found}", kind)
