"""The file that a name in a catalogue stands for, below the folder of photos.

Names are written by other programs on other systems: a leading slash, backslashes, the folder's
own path in front, another case, a missing extension, and addresses' escapes are understood where
exactly one file fits. None leads out of the folder.
"""

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from shards.photos.remarks import (
    ADDRESS,
    BROKEN_LINK,
    FOLDER,
    LINK_OUTSIDE,
    NOT_FOUND,
    OUTSIDE,
    SEVERAL_FILES,
    SEVERAL_NAMES,
    UNUSABLE_PATH,
    PhotoRefused,
)

SUFFIXES = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jfif",
)  # fmt: skip
"""Extensions of photos, without the dot."""
IS_PHOTO = re.compile(rf"[.]({'|'.join(SUFFIXES)})$", re.IGNORECASE)
SEPARATORS = re.compile(r"[\s|;,\[\]\"']+")
"""What stands between names where one cell has several, a list of JSON included."""
ADDRESS_START = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+://|//[\w-]+[.][\w.-]+/|www[.])")


def find_photo(root: Path, name: str, follow_links: bool = False) -> Path:
    """The path of the file that `name` stands for below `root`.

    Links are followed inside `root`; with `follow_links` they may lead out of it, names still
    may not. Raises PhotoRefused when no file or more than one fits.
    """
    refused: list[PhotoRefused] = []
    try:
        for spelling in dict.fromkeys(_spellings(root, name)):
            try:
                return _inside(root, spelling, follow_links)
            except PhotoRefused as error:
                refused.append(error)
        found: dict[tuple[int, int], Path] = {}
        for spelling in [] if ADDRESS_START.match(name) else _respellings(name):
            try:
                path = _inside(root, spelling, follow_links)
                # On a disk that ignores case, several spellings are one file.
                found.setdefault((path.stat().st_dev, path.stat().st_ino), path)
            except PhotoRefused as error:
                refused.append(error)
    except (ValueError, OSError, RuntimeError):
        # A NUL, half a surrogate pair, a name too long, links in a circle.
        raise PhotoRefused(UNUSABLE_PATH) from None
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        fitting = ", ".join(sorted(path.name for path in found.values()))
        raise PhotoRefused(f"{SEVERAL_FILES}: {fitting}", SEVERAL_FILES)
    # That a link or a folder is there says more than that a file is not.
    known = [one for one in refused if one.kind not in (NOT_FOUND, OUTSIDE)]
    names = [part for part in SEPARATORS.split(name) if part]
    if not known and ADDRESS_START.match(name):
        raise PhotoRefused(ADDRESS)
    if not known and len(names) > 1 and all(IS_PHOTO.search(one) for one in names):
        raise PhotoRefused(f"{SEVERAL_NAMES}: {len(names)}", SEVERAL_NAMES)
    raise (known or [one for one in refused if one.kind == OUTSIDE] or refused)[0]


def _spellings(root: Path, name: str) -> Iterator[str]:
    """`name` as it stands, then below `root`, then what stands behind the folder's own name."""
    yield name
    if ADDRESS_START.match(name):
        return
    yield (plain := _with_slashes(name))
    parts, folder = PurePosixPath(plain).parts, root.resolve().name
    for place, part in enumerate(parts[:-1], 1):
        if part == folder:
            yield "/".join(parts[place:])


def _with_slashes(name: str) -> str:
    """A relative path of `name`, without the drive of Windows."""
    return re.sub(r"^[A-Za-z]:(?=/)", "", name.replace("\\", "/")).lstrip("/")


def _respellings(name: str) -> Iterator[str]:
    """Spellings of `name` that differ by what programs change in names, each of them once."""
    plain = _with_slashes(name)
    spelled = [plain, plain.strip("[]\"' \t\n"), unquote(plain)]
    spelled += [unicodedata.normalize(form, plain) for form in ("NFC", "NFD")]
    for one in dict.fromkeys(spelled):
        folder, slash, base = one.rpartition("/")
        stem, dot, extension = base.rpartition(".")
        cases = [base, base.lower(), base.upper()]
        cases += [stem + dot + extension.lower(), stem + dot + extension.upper()]
        if base.strip(". ") and not IS_PHOTO.search(base):
            ends = [end for suffix in SUFFIXES for end in (suffix, suffix.upper())]
            cases += [f"{one}.{end}" for one in cases[:3] for end in ends]
        for place in dict.fromkeys([folder, folder.lower(), folder.upper()]):
            yield from (place + slash + case for case in dict.fromkeys(cases))


def _inside(root: Path, name: str, follow_links: bool) -> Path:
    """The path of the file called exactly `name` below `root`; raises PhotoRefused otherwise."""
    # As it is written: what follow_links allows are links, not names that lead elsewhere.
    written, folder = Path(os.path.abspath(root / name)), root.resolve()
    named_inside = any(written.is_relative_to(one) for one in (os.path.abspath(root), folder))
    path = written if follow_links else (root / name).resolve()
    is_inside = named_inside if follow_links else path.is_relative_to(folder)
    if is_inside and path.is_file():
        return path
    if named_inside and written.is_symlink() and not written.exists():
        raise PhotoRefused(BROKEN_LINK)
    if not is_inside:
        raise PhotoRefused(LINK_OUTSIDE if named_inside else OUTSIDE)
    raise PhotoRefused(FOLDER if path.is_dir() and name.strip("/.") else NOT_FOUND)
