"""The samples of a tar that others made: what each member is, and the facts of each item.

Names follow WebDataset: an item's members stand together and have one name up to the first dot of
the base name. The photo is jpg, jpeg, png, webp, gif, bmp, tif or tiff; txt is the title, cls the
label, json may hold posting_id, title (or caption) and label_group. No other member is read.
"""

import io
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from isal.isal_zlib import crc32

from shards.errors import BadInput, Corrupt
from shards.index import ABSENT, MEMBERS, RECORD
from shards.members import Member, members
from shards.options import PackOptions
from shards.photo import MAX_BYTES, prepare_photo
from shards.srgb import PhotoRefused, bound_by, open_photo, orientation

PHOTOS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
ROLES = dict.fromkeys(PHOTOS, "jpg") | {"json": "json", "txt": "txt", "cls": "cls"}
MAX_TEXT = 2**20
KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
PROBE = PackOptions(size=64)
"""Photos stay as they are stored; reduced to so few pixels they tell their perceptual hash."""


@dataclass
class _Sample:
    key: str
    at: int
    members: dict[str, Member] = field(default_factory=dict)


def scan_tar(
    tar: Path, columns: Mapping[str, str], leave: Collection[str]
) -> tuple[pd.DataFrame, np.ndarray]:
    """Facts (one row a sample) and index records (one a sample that is packed) of `tar`.

    `columns` names the json keys of posting_id, title and label_group where they are others;
    members whose suffix or base name is in `leave` are left unread. posting_id is "" where the
    key is to be it. Raises Corrupt for a tar that is not whole, or whose members are not adjacent,
    double, of an unknown kind or no text; BadInput for json that lacks what `columns` names.
    """
    facts, records = [], []
    with tar.open("rb") as file:
        for slot, sample in enumerate(_samples(tar, leave)):
            fact, record = _Reader(tar, file, sample, columns).read()
            record["slot"] = slot
            facts.append(fact | {"slot": slot})
            if fact["status"] == "packed":
                records.append(record)
    if not facts:
        raise Corrupt(f"{tar}: holds no item; restore it or take it out of the folder")
    return pd.DataFrame(facts), np.array(records, RECORD)


def _samples(tar: Path, leave: Collection[str]) -> Iterator[_Sample]:
    seen: dict[str, int] = {}
    sample = None
    for member in members(tar):
        key, suffix = _key_and_suffix(tar, member, leave)
        if suffix in leave:
            continue
        role = _role(tar, member, key, suffix)
        if sample is None or key != sample.key:
            if key in seen:
                raise Corrupt(
                    f"{tar}: byte {member.header_at}: {member.name!r} stands apart from the other "
                    f"members of its item (byte {seen[key]}); make the tar with --sort=name"
                )
            if sample is not None:
                yield sample
            sample = _Sample(key, member.header_at)
            seen[key] = member.header_at
        if role in sample.members:
            other = sample.members[role].name
            raise Corrupt(
                f"{tar}: byte {member.header_at}: {member.name!r} beside {other!r}: an item has "
                f"one such member; leave one kind unread with --leave SUFFIX"
            )
        sample.members[role] = member
    if sample is not None:
        yield sample


def _key_and_suffix(tar: Path, member: Member, leave: Collection[str]) -> tuple[str, str]:
    # webdataset's base_plus_ext
    found = KEY.fullmatch(member.name)
    base = member.name.rpartition("/")[2]
    if base in leave:
        return member.name, base
    if found is None:
        raise Corrupt(
            f"{tar}: byte {member.header_at}: {member.name!r} has no name before a suffix, so it "
            f"is no part of an item; leave it unread with --leave {base}"
        )
    return found[1], found[2].lower()


def _role(tar: Path, member: Member, key: str, suffix: str) -> str:
    role = ROLES.get(suffix)
    where = f"{tar}: byte {member.header_at}: {member.name!r}"
    if role is None:
        raise Corrupt(
            f"{where} is of an unknown kind (known: {', '.join(ROLES)}); leave such members "
            f"unread with --leave {suffix}. An item's name ends at its first dot: {key!r}"
        )
    most = MAX_BYTES if role == "jpg" else MAX_TEXT
    if member.size > most:
        raise Corrupt(f"{where} has {member.size} bytes, over {most}; take it out of the tar")
    return role


@dataclass(frozen=True)
class _Reader:
    tar: Path
    file: io.BufferedReader
    sample: _Sample
    columns: Mapping[str, str]

    def read(self) -> tuple[dict[str, Any], np.ndarray]:
        """The sample's facts, and its index record but for slot and class."""
        record = np.zeros((), RECORD)
        data = {role: self._member(role, record) for role in MEMBERS}
        reasons: list[str] = []
        about = self._about(data["json"])
        photo = self._photo(data["jpg"], reasons)
        if not photo["has_image"]:
            record["jpg_size"] = ABSENT
        title = self._title(about, data["txt"], reasons)
        packed = photo["has_image"] or bool(title)
        label = self._told(about, "label_group")
        if not label.strip():  # blanks name no product
            label = _decoded(data["cls"], "cls", reasons).strip()
        image = self.sample.members.get("jpg")
        return {
            "posting_id": self._posting_id(about),
            "key": self.sample.key,
            "image": image.name if image else "",
            "label_group": label,
            "cls": (data["cls"] or b"").decode(errors="replace").strip(),
            "status": "packed" if packed else "rejected",
            "reason": "; ".join(reasons) or ("" if packed else "neither a photo nor a title"),
            **photo,
            "has_text": bool(title),
            "title": title,
        }, record

    def _member(self, role: str, record: np.ndarray) -> bytes | None:
        record[f"{role}_size"] = ABSENT
        member = self.sample.members.get(role)
        if member is None:
            return None
        self.file.seek(member.at)
        data = self.file.read(member.size)
        if len(data) != member.size:
            raise Corrupt(f"{self.tar}: became shorter while it was read; restore it")
        record[f"{role}_at"], record[f"{role}_size"] = member.at, member.size
        record[f"{role}_crc"] = crc32(data)
        return data

    def _where(self) -> str:
        return f"{self.tar}: byte {self.sample.at}: item {self.sample.key!r}"

    def _about(self, data: bytes | None) -> dict[str, Any]:
        try:
            about = json.loads(data) if data is not None else {}
        except (ValueError, RecursionError) as error:
            raise Corrupt(f"{self._where()}: json cannot be read ({error})") from None
        if not isinstance(about, dict):
            raise Corrupt(f"{self._where()}: json is no object of names and values")
        return about

    def _posting_id(self, about: dict[str, Any]) -> str:
        posting_id = self._told(about, "posting_id")
        if not posting_id and "posting_id" in self.columns:
            name = self.columns["posting_id"]
            raise BadInput(f"{self._where()}: its json has no {name}; leave --columns away")
        return posting_id

    def _title(self, about: dict[str, Any], text: bytes | None, reasons: list[str]) -> str:
        names = [self.columns["title"]] if "title" in self.columns else ["title", "caption"]
        first, *others = [self._told(about, "title", name) for name in names]
        given = [first, _decoded(text, "txt", reasons), *others]
        title = next((one for one in given if one.strip()), "")
        if len(title) > PROBE.max_title:
            reasons.append(f"title of {len(title)} characters cut")
        return title[: PROBE.max_title]

    def _told(self, about: dict[str, Any], column: str, name: str = "") -> str:
        name = name or self.columns.get(column, column)
        value = about.get(name)
        if value is None or value != value:  # pandas writes NaN where nothing is
            return ""
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # what pandas makes of whole numbers where some are missing
        if isinstance(value, list | dict):
            raise BadInput(
                f"{self._where()}: {name} of its json is no text or number; "
                f"name another with --columns {column}=NAME"
            )
        text = value if isinstance(value, str) else json.dumps(value)
        return text.encode(errors="replace").decode()  # half a surrogate pair is no text

    def _photo(self, data: bytes | None, reasons: list[str]) -> dict[str, Any]:
        none = {"sha256": "", "phash": "", "colours": "", "width": 0, "height": 0}
        if data is None:
            return none | {"has_image": False}
        try:
            photo = prepare_photo(data, PROBE)
        except PhotoRefused as refused:
            reasons.append(f"photo {self.sample.members['jpg'].name}: {refused}")
            return none | {"has_image": False}
        width, height = _size(data)
        told = {name: getattr(photo, name) for name in ("sha256", "phash", "colours")}
        return told | {"width": width, "height": height, "has_image": True}


def _decoded(data: bytes | None, role: str, reasons: list[str]) -> str:
    if data is None:
        return ""
    try:
        return data.decode()
    except UnicodeDecodeError:
        reasons.append(f"{role} is not UTF-8, what cannot be read is replaced")
        return data.decode(errors="replace")


def _size(data: bytes) -> tuple[int, int]:
    with bound_by(PROBE.max_pixels):
        image = open_photo(data, PROBE.max_pixels)
        width, height = image.size
        return (height, width) if orientation(image) in (5, 6, 7, 8) else (width, height)
