"""The samples of a tar from another tool: the role of each member, and the facts of each item.

Names follow WebDataset: an item's members stand together and have one name up to the first dot of
the base name. The photo is jpg, png, webp or another of find.SUFFIXES; txt is the title, cls the
label, json may hold posting_id, title (or caption), label_group and split. No other member is read.
"""

import io
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from isal.isal_zlib import crc32

from shards.catalogue.placeholders import label_of, value_of
from shards.catalogue.split import SPLIT_NAMES
from shards.catalogue.titles import has_text
from shards.photos.decode import bound_by, open_photo, orientation
from shards.photos.find import SUFFIXES
from shards.photos.options import PackOptions
from shards.photos.photo import MAX_BYTES, Photo, photo_facts, prepare_photo
from shards.photos.remarks import (
    LABEL_LEFT_OUT,
    NOT_UTF8,
    NOTHING,
    TITLE_CUT,
    PhotoRefused,
    Remark,
    remark_facts,
    remark_of_photo,
)
from shards.storage.errors import BadInput, Corrupt
from shards.tar.index import ABSENT, MEMBERS, RECORD
from shards.tar.scan import Member, members

ROLES = dict.fromkeys(SUFFIXES, "jpg") | {"json": "json", "txt": "txt", "cls": "cls"}
COLUMNS = ("posting_id", "title", "label_group", "split")
MAX_TEXT = 2**20
OF_SYSTEMS = ("._*", ".ds_store", "thumbs.db", "desktop.ini")
"""Members that macOS and Windows add to every folder: attributes and views, never an item's."""
KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
PROBE = PackOptions(size=64)
"""Photos stay as they are stored; they are only reduced this much to compute their signature."""


@dataclass
class _Sample:
    """The members by role of an item that begins at byte `at`, and remarks on what is not used."""

    tar: Path
    key: str
    at: int
    members: dict[str, Member] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)

    def read(
        self, file: io.BufferedReader, columns: Mapping[str, str]
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The sample's facts, and its index record without slot and class."""
        record, data = np.zeros((), RECORD), dict.fromkeys(MEMBERS, b"")
        for role in MEMBERS:
            record[f"{role}_size"] = ABSENT
        for role, member in self.members.items():
            file.seek(member.at)
            data[role] = file.read(member.size)
            if len(data[role]) != member.size:
                raise Corrupt(f"{self.tar}: became shorter while it was read; restore it")
            record[f"{role}_at"], record[f"{role}_size"] = member.at, member.size
            record[f"{role}_crc"] = crc32(data[role])
        try:
            about = json.loads(data["json"]) if "json" in self.members else {}
        except (ValueError, RecursionError) as error:
            raise Corrupt(f"{self._where()}: json cannot be read ({error})") from None
        if not isinstance(about, dict):
            raise Corrupt(f"{self._where()}: json is no object of names and values")
        names = {column: columns.get(column, column) for column in COLUMNS}
        posting_id = self._value(about, names["posting_id"], "posting_id")
        if not posting_id and "posting_id" in columns:
            raise BadInput(
                f"{self._where()}: its json has no {names['posting_id']}; leave --columns away"
            )
        photo = photo_facts(self._photo(data["jpg"]) if "jpg" in self.members else None)
        if not photo["has_image"]:
            record["jpg_size"] = ABSENT
        # The first with something to see of title in json, txt, and caption in json.
        titles = [self._value(about, names["title"], "title"), self._text(data["txt"], "txt")]
        if "title" not in columns:
            titles.append(self._value(about, "caption", "title"))
        title = next((one for one in map(value_of, titles) if has_text(one)), "")
        if len(title) > PROBE.max_title:
            self.remarks.append(Remark(TITLE_CUT, f"title of {len(title)} characters cut"))
        title = title[: PROBE.max_title]
        is_packed = photo["has_image"] or bool(title)
        if not is_packed and not self.remarks:
            self.remarks.append(Remark(NOTHING, NOTHING))
        labels = (
            self._value(about, names["label_group"], "label_group"),
            self._text(data["cls"], "cls").strip(),
        )
        label = next(filter(None, map(label_of, labels)), "")
        if not label and (written := next(filter(str.strip, labels), "")):
            text = f"label_group {written.strip()} taken as empty"
            self.remarks.append(Remark(LABEL_LEFT_OUT, text))
        return {
            "posting_id": posting_id,
            "key": self.key,
            "folder": self._split(self._value(about, names["split"], "split"), label),
            "image": self.members["jpg"].name if "jpg" in self.members else "",
            "label_group": label,
            "cls": data["cls"].decode(errors="replace").strip(),
            "status": "packed" if is_packed else "rejected",
            **remark_facts(self.remarks),
            **photo,
            "has_text": bool(title),
            "title": title,
        }, record

    def _split(self, written: str, label: str) -> str:
        """The split that json names, empty where it names none."""
        name = value_of(written).strip().lower()
        if name and (name not in SPLIT_NAMES or (label and SPLIT_NAMES[name] == "unlabelled")):
            raise BadInput(
                f"{self._where()}: split {written!r} of its json is none of train, val and test; "
                "name another with --columns split=NAME"
            )
        return SPLIT_NAMES[name] if name else ""

    def _where(self) -> str:
        return f"{self.tar}: byte {self.at}: item {self.key!r}"

    def _value(self, about: dict[str, Any], name: str, column: str) -> str:
        """A value of json as text, empty where missing. Raises BadInput for lists and objects."""
        value = about.get(name)
        if value is None or value != value:  # pandas writes NaN for a missing value
            return ""
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # pandas makes integers floats where some are missing
        if isinstance(value, list | dict):
            raise BadInput(
                f"{self._where()}: {name} of its json is no text or number; "
                f"name another with --columns {column}=NAME"
            )
        text = value if isinstance(value, str) else json.dumps(value)
        return text.encode(errors="replace").decode()  # half a surrogate pair is no text

    def _text(self, data: bytes, role: str) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            text = f"{role} is not UTF-8, what cannot be read is replaced"
            self.remarks.append(Remark(NOT_UTF8, text))
            return data.decode(errors="replace")

    def _photo(self, data: bytes) -> Photo | None:
        """The photo with its size as it lies in the tar; None where it cannot be used."""
        try:
            photo = prepare_photo(data, PROBE)
        except PhotoRefused as refused:
            self.remarks.append(remark_of_photo(self.members["jpg"].name, refused))
            return None
        with bound_by(PROBE.max_pixels):
            image = open_photo(data, PROBE.max_pixels)
            width, height = image.size
            if orientation(image) in (5, 6, 7, 8):  # lies on its side
                width, height = height, width
        return replace(photo, width=width, height=height)


def scan_tar(
    tar: Path, columns: Mapping[str, str], leave: Collection[str]
) -> tuple[pd.DataFrame, np.ndarray]:
    """Facts (one row a sample) and index records (one a sample that is packed) of `tar`.

    `columns` has the json keys of posting_id, title, label_group and split where they are others;
    members whose suffix or base name fits a pattern of `leave`, and those of OF_SYSTEMS, are not
    read. posting_id is "" where the key is
    to be used. Raises Corrupt for a damaged tar, or members that are not adjacent, repeated, of an
    unknown kind or no text; BadInput for json that lacks what `columns` names.
    """
    facts, records = [], []
    with tar.open("rb") as file:
        for slot, sample in enumerate(_samples(tar, leave)):
            fact, record = sample.read(file, columns)
            record["slot"] = slot
            facts.append(fact | {"slot": slot})
            if fact["status"] == "packed":
                records.append(record)
    if not facts:
        raise Corrupt(f"{tar}: holds no item; restore it or take it out of the folder")
    return pd.DataFrame(facts), np.array(records, RECORD)


def _samples(tar: Path, leave: Collection[str]) -> list[_Sample]:
    """Group the members of a tar by key; raises Corrupt as `scan_tar` does."""
    samples: dict[str, _Sample] = {}
    sample = None
    for member in members(tar):
        where = f"{tar}: byte {member.header_at}: {member.name!r}"
        base = member.name.rpartition("/")[2]
        found = KEY.fullmatch(member.name)  # webdataset's base_plus_ext
        suffix = found[2].lower() if found else ""
        if _fits(base, OF_SYSTEMS) or _fits(base, leave) or _fits(suffix, leave):
            continue
        if found is None:
            raise Corrupt(
                f"{where} has no name before a suffix, so it is no part of an item; leave it "
                f"unread with --leave {base}"
            )
        key = found[1]
        if (role := ROLES.get(suffix)) is None:
            raise Corrupt(
                f"{where} is of an unknown kind (known: {', '.join(ROLES)}); leave such members "
                f"unread with --leave {suffix}. An item's name ends at its first dot: {key!r}"
            )
        if member.size > (most := MAX_BYTES if role == "jpg" else MAX_TEXT):
            raise Corrupt(f"{where} has {member.size} bytes, over {most}; take it out of the tar")
        if key in samples and (same := samples[key].members.get(role)) is not None:
            if same.name == member.name:
                raise Corrupt(
                    f"{where} is there twice, before at byte {same.header_at}, as tar --append and "
                    "--update leave it; extract the tar and make it anew: the last one counts"
                )
            raise Corrupt(
                f"{where} beside {same.name!r}: an item has one such member; leave one of them "
                f"unread with --leave {suffix} or --leave {base}"
            )
        if key in samples and samples[key] is not sample:
            raise Corrupt(
                f"{where} stands apart from the other members of its item (byte "
                f"{samples[key].at}); make the tar with --sort=name"
            )
        sample = samples.setdefault(key, _Sample(tar, key, member.header_at))
        sample.members[role] = member
    return list(samples.values())


def _fits(name: str, patterns: Collection[str]) -> bool:
    """Whether a suffix or base name fits a pattern such as npy, .npy, *.npy or README."""
    name, lower = name.lower(), [pattern.lower() for pattern in patterns]
    return any(name in (one, one.lstrip(".")) or fnmatchcase(name, one) for one in lower if name)
