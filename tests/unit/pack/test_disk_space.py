"""Free space on the disk and missing photos: what is reported, and from which byte on."""

import errno
import math
import shutil
import sqlite3
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from shards.catalogue.rows import Catalogue
from shards.pack.build import samples
from shards.pack.disk_space import (
    check_survey,
    full_disk_fails,
    survey,
    written,
)
from shards.pack.plan import Plan, make_plan
from shards.photos.options import PackOptions
from shards.storage.errors import BadInput, Failed
from shards.storage.files import format_bytes
from shards.tar.scan import members
from shards.tar.write import write_shard
from tests.support.tars import photo

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set of which 3 000 bytes are complete, on a disk with 7 000 free ones."""
    for name, size in (("train/000000.tar", 2_000), ("train/000000.idx", 600),
                       ("val/000000.tar", 400), ("val/.000001.tar.tmp-host-1", 5_000),
                       (".pack/plan.sqlite", 9_000)):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 7_000, 7_000))
    return tmp_path


def test_what_is_complete_needs_no_space(shards: Path) -> None:
    assert written(shards) == 3_000
    check_survey({"bytes": 10_000, "photos": []}, None, shards, PackOptions())
    with pytest.raises(Failed, match=r"no room: about 0\.0 MB needed, 0\.0 MB free"):
        check_survey({"bytes": 10_001, "photos": []}, None, shards, PackOptions())


def test_sizes_format_bytes() -> None:
    sizes = (0, 50_000, 999_900_000, 10**9, 12_340_000_000)
    texts = ["0.0 MB", "0.1 MB", "999.9 MB", "1.0 GB", "12.3 GB"]
    assert [format_bytes(size) for size in sizes] == texts


def sqlite_error(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "none"), OSError(errno.EDQUOT, "none"), OSError(errno.EFBIG, "none"),
     sqlite_error(sqlite3.SQLITE_FULL), sqlite_error(sqlite3.SQLITE_IOERR_WRITE)],
    ids=repr,
)  # fmt: skip
def test_a_full_disk_is_reported_with_what_is_complete(shards: Path, error: Exception) -> None:
    message = r"no room left .*0\.0 MB of shards are complete.*goes on"
    with pytest.raises(Failed, match=message), full_disk_fails(shards):
        raise error


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "none"), OSError(errno.EACCES, "none"),
     sqlite_error(sqlite3.SQLITE_CORRUPT), ValueError("none")],
    ids=repr,
)  # fmt: skip
def test_other_errors_stay_what_they_are(shards: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, full_disk_fails(shards):
        raise error
    assert raised.value is error


def test_photos_that_were_there_for_the_plan_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").touch()
    check_survey({"bytes": 0, "photos": ["a.jpg", "b.jpg"]}, tmp_path, tmp_path, PackOptions())
    check_survey({"bytes": 0, "photos": []}, tmp_path, tmp_path, PackOptions())
    check_survey({"bytes": 0, "photos": ["a.jpg"]}, None, tmp_path, PackOptions())
    with pytest.raises(BadInput, match=r"it lacks a\.jpg and every other photo"):
        check_survey({"bytes": 0, "photos": ["a.jpg", "c.jpg"]}, tmp_path, tmp_path, PackOptions())


def plan_of(folder: Path, rows: list[str]) -> tuple[Plan, Path]:
    catalogue = folder / "c.csv"
    catalogue.write_text("\n".join(["posting_id,image,title", *rows]))
    make_plan(folder / "p", Catalogue(catalogue), PackOptions(), "a test")
    return Plan(folder / "p", "a test"), catalogue


@pytest.mark.parametrize("items", [1, 39, 1_400])
@pytest.mark.parametrize("varied", [False, True])
def test_the_estimate_is_the_mean_of_a_sample_and_two_standard_errors(
    tmp_path: Path, items: int, varied: bool
) -> None:
    """Against what the tar of each posting of the sample takes, written by itself."""
    titles = ["x" * (1 + 700 * (n % 7) * varied) for n in range(items)]
    plan, catalogue = plan_of(tmp_path, [f"{n:04d},,{title}" for n, title in enumerate(titles)])
    sample = plan.sample(max(1, min(64, items // 20)))
    taken = []
    for row in sample:
        facts: list[dict] = []
        packed = samples([row._replace(slot=0)], None, PackOptions(), facts)
        write_shard(tmp_path / "000000.tar", packed, lambda: None)
        found = list(members(tmp_path / "000000.tar"))
        taken.append(sum(512 + math.ceil(member.size / 512) * 512 for member in found))
    error = np.std(taken, ddof=1) / math.sqrt(len(taken)) if len(taken) > 1 else 0
    expected = (np.mean(taken) + 2 * error + 300) * items + 2 * catalogue.stat().st_size
    found = survey(plan, catalogue, None, PackOptions())
    assert found["photos"] == []
    assert found["bytes"] == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("named", "there", "whole"),
    [(400, 0, False), (400, 1, True), (400, 400, True), (80, 0, False), (5, 0, True), (0, 0, True)],
)
def test_a_folder_that_has_none_of_many_photos_is_refused(
    tmp_path: Path, named: int, there: int, whole: bool
) -> None:
    """400 postings: a sample of 20 is prepared, and all photos are looked for."""
    photos = tmp_path / "photos"
    photos.mkdir()
    plan, catalogue = plan_of(
        tmp_path, [f"{n},{f'{n}.jpg' if n < named else ''},t" for n in range(400)]
    )
    for number in range(400 - there, 400):
        (photos / f"{number}.jpg").write_bytes(photo(number))
    if whole:
        lacking = [row for row in plan.sample(20) if row.image]
        found = survey(plan, catalogue, photos, PackOptions())["photos"]
        assert set(found) == {row.image for row in lacking if int(row.row) > 400 - there}
        return
    first = next(row for row in plan.sample(400) if row.image)
    message = (
        rf"not one .* of {named} looked for: {named} × photo: file not found, for example "
        rf"row {first.row}: photo {first.image}: .*--images"
    )
    with pytest.raises(BadInput, match=message):
        survey(plan, catalogue, photos, PackOptions())
