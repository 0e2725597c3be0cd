"""A disk that is too small, or fills up: a clear end, no broken file, and the command goes on."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.verify import verify
from shards.storage.errors import Failed
from tests.support.packing import command, temporary_files, tree

OPTIONS = PackOptions(size=24, shard_items=50)


@pytest.fixture(scope="module")
def all_of_it(catalogue: Path) -> Path:
    return catalogue / "catalogue.csv"


@pytest.fixture(scope="module")
def undisturbed(all_of_it: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "s"
    pack(all_of_it, all_of_it.parent / "images", out, OPTIONS)
    return tree(out)


def run(all_of_it: Path, out: Path, limit: int | None = None, *more: str) -> tuple[int, str]:
    """Exit code and output of a pack whose files may not pass `limit` bytes."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        command(all_of_it, out, *more, shard_items=50), capture_output=True, text=True,
        preexec_fn=limited, timeout=200,
    )  # fmt: skip
    return done.returncode, done.stderr


def check_went_on(all_of_it: Path, out: Path, undisturbed: dict[str, str]) -> None:
    assert temporary_files(out) == []
    assert run(all_of_it, out)[0] == 0
    assert verify(out) == []
    assert tree(out) == undisturbed


# ── a limit on the size of a file: writes fail in the middle, at the same byte every time


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_tar_that_cannot_be_written_whole_leaves_none(
    all_of_it: Path, undisturbed: dict[str, str], tmp_path: Path, workers: str
) -> None:
    out = tmp_path / "s"
    code, output = run(all_of_it, out, 130_000, "--workers", workers)
    assert code == 1, output
    assert re.search(
        r"s: no room left \(.*File too large.*\); .* free .*same command goes on", output
    )
    assert json.loads((out / "status.json").read_text())["status"] == "failed"
    assert not (out / "manifest.json").exists()
    assert [tar for tar in out.glob("*/*.tar") if tar.stat().st_size >= 130_000] == []
    check_went_on(all_of_it, out, undisturbed)


def test_a_plan_that_cannot_be_written_whole_leaves_none(
    all_of_it: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "s"
    code, output = run(all_of_it, out, 16_000)
    assert code == 1, output
    assert "s: no room left" in output
    assert not (out / ".pack" / "plan.sqlite").exists()
    check_went_on(all_of_it, out, undisturbed)


# ── a small disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "pack-test", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root may mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that fills a disk up to `leave` bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave)
    return folder / "filler"


def test_too_little_space_is_reported_before_a_tar_is_begun(
    all_of_it: Path, undisturbed: dict[str, str], small_disk: Path
) -> None:
    filler, out = fill(small_disk, 900_000), small_disk / "s"
    message = r"s: no room: about [\d.]+ MB needed, 0\.\d MB free on its file system; make room"
    with pytest.raises(Failed, match=message):
        pack(all_of_it, all_of_it.parent / "images", out, OPTIONS)
    assert list(out.glob("*/*.tar")) == []
    filler.unlink()
    check_went_on(all_of_it, out, undisturbed)


def test_a_disk_that_fills_up_while_packing(
    all_of_it: Path, undisturbed: dict[str, str], small_disk: Path
) -> None:
    out = small_disk / "s"
    process = subprocess.Popen(
        command(all_of_it, out, shard_items=50), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while not list(out.glob("*/.*.tar.tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)  # so that the space stays free meanwhile
    filler = fill(small_disk, 8_192)
    process.send_signal(signal.SIGCONT)
    output = process.communicate(timeout=100)[1]
    assert process.returncode == 1, output
    assert re.search(r"s: no room left \(.*No space left.*same command goes on", output)
    assert not (out / "manifest.json").exists()
    filler.unlink()
    check_went_on(all_of_it, out, undisturbed)


# ── the estimate


def test_the_estimate_is_near_what_is_written(all_of_it: Path, tmp_path: Path) -> None:
    from shards.catalogue.rows import Catalogue
    from shards.pack.disk_space import survey, written
    from shards.pack.plan import Plan, make_plan

    images = all_of_it.parent / "images"
    make_plan(tmp_path / "p", Catalogue(all_of_it), OPTIONS, "one")
    expected = survey(Plan(tmp_path / "p", "one"), all_of_it, images, OPTIONS)
    pack(all_of_it, images, tmp_path / "s", OPTIONS)
    real = written(tmp_path / "s") + (tmp_path / "s" / "items.parquet").stat().st_size
    assert real < expected["bytes"] < 1.6 * real
    assert all((images / name).is_file() for name in expected["photos"])
    assert expected["photos"]
