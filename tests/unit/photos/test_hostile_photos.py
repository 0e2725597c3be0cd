"""Tars and indices that mean harm: nothing is run, nothing written outside, memory is bounded."""

import io
import pickle
import re
import resource
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from shards.pack.index_tars import index_tars
from shards.photos.decode import PhotoRefused, decode_photo
from shards.photos.options import PackOptions
from shards.photos.photo import prepare_photo
from shards.read.shard_set import ShardSet
from shards.storage.errors import Corrupt
from shards.tar.index import read_index, write_index
from tests.support.damage import vouch_again
from tests.support.tars import photo, samples, write_tar

MEMORY = 1 << 30
"""Bytes that the reading of a hostile tar may take, and the interpreter with pandas beside it."""


class Opened:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pth", "pt", "npy", "cbor", "PYD"])
def test_members_that_others_would_execute_are_refused(tmp_path: Path, suffix: str) -> None:
    harm = pickle.dumps(Opened(tmp_path / "harmed"))
    write_tar(tmp_path / "t" / "0.tar", [("a.txt", b"t"), (f"a.{suffix}", harm)])
    before = listing(tmp_path)
    with pytest.raises(Corrupt, match=rf"0\.tar: byte 1024: 'a\.{suffix}' is of an unknown kind"):
        index_tars(tmp_path / "t")
    assert listing(tmp_path) == before
    # Not even where a person asks to leave it.
    index_tars(tmp_path / "t", leave=[suffix.lower()])
    assert ShardSet(tmp_path / "t").reader()[0].title == "t"
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("suffix", ["jpg", "json", "txt", "cls"])
def test_a_pickle_under_a_known_name_is_only_bytes(tmp_path: Path, suffix: str) -> None:
    harm = pickle.dumps(Opened(tmp_path / "harmed"), protocol=0)
    write_tar(tmp_path / "t" / "0.tar", [(f"a.{suffix}", harm), ("b.txt", b"t")])
    if suffix == "json":
        with pytest.raises(Corrupt, match="'a': json cannot be read"):
            index_tars(tmp_path / "t")
    else:
        index_tars(tmp_path / "t")
        assert [item.photo for item in read_all(tmp_path / "t")] == [None] * len(
            read_all(tmp_path / "t")
        )
    assert not (tmp_path / "harmed").exists()


def read_all(folder: Path) -> list:
    reader = ShardSet(folder).reader()
    return [reader[place] for place in range(len(reader))]


NAMES = ("../a.txt", "/tmp/a.txt", "d/../../a.txt", "d/..", "..", "/../a.txt", "//a.txt")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str, form: int) -> None:
    write_tar(tmp_path / "t" / "0.tar", [("a.txt", b"t"), (name, b"x")], form)
    before = listing(tmp_path)
    with pytest.raises(Corrupt, match=r"0\.tar: byte 1024: the name '.*' leads out"):
        index_tars(tmp_path / "t")
    assert listing(tmp_path) == before


def test_a_long_name_that_leads_outside_is_refused(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        write_tar(tmp_path / "0.tar", [("d/" * 80 + "../" * 90 + "a.txt", b"x")], form)
        with pytest.raises(Corrupt, match="leads out"):
            index_tars(tmp_path)


KINDS = {
    tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a character device", tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a FIFO", tarfile.GNUTYPE_SPARSE: "a sparse file",
    b"V": "a volume label", b"M": "a part of a member", b"Z": "of the unknown kind b'Z'",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(Corrupt, match=rf"0\.tar: byte 0: 'a\.jpg' is {KINDS[kind]}"):
        index_tars(tmp_path)
    assert listing(tmp_path) == {tmp_path / "0.tar"}


def test_sparse_files_of_pax_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    for version in ("0.0", "0.1", "1.0"):
        subprocess.run(
            ["tar", "-C", tmp_path, "--format=posix", "--sparse", f"--sparse-version={version}",
             "-cf", tmp_path / "0.tar", "a.txt"], check=True,
        )  # fmt: skip
        with pytest.raises(Corrupt, match=r"0\.tar: byte 0: a sparse file"):
            index_tars(tmp_path)


def declared(path: Path, size: bytes, kind: bytes = b"0") -> Path:
    """A tar whose first header declares `size`, with a right checksum."""
    data = bytearray(write_tar(path, [("a.jpg", photo(0)), ("b.txt", b"t")]).read_bytes())
    data[124:136], data[156:157], data[148:156] = size, kind, b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    return path


HUGE = {"8 GiB": b"77777777777\0", "2^94": b"\x80" + b"\x3f" + b"\xff" * 10,
        "negative": b"\xff" * 12, "not octal": b"9" * 11 + b"\0"}  # fmt: skip


@pytest.mark.parametrize("size", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L"])
def test_gigantic_sizes_are_refused_without_the_memory(
    tmp_path: Path, size: bytes, kind: bytes
) -> None:
    tar = declared(tmp_path / "0.tar", size, kind)
    output = limited(f"index_tars(Path({str(tmp_path)!r}))")
    assert f"Corrupt: {tar}: byte 0: " in output
    assert listing(tmp_path) == {tar}


def test_a_gigantic_size_of_pax_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"size": "9" * 19}
        tar.addfile(info)
    with pytest.raises(Corrupt, match="declares 9999999999999999999 bytes"):
        index_tars(tmp_path)


@pytest.mark.parametrize(("suffix", "bytes_"), [("json", 2**20 + 1), ("jpg", 2**28 + 1)])
def test_members_too_large_for_their_kind_are_refused(
    tmp_path: Path, suffix: str, bytes_: int
) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo(f"a.{suffix}")
        info.size = bytes_
        tar.fileobj.write(info.tobuf())
        tar.fileobj.truncate(512 + -(-bytes_ // 512) * 512 + 1024)
    output = limited(f"index_tars(Path({str(tmp_path)!r}))")
    assert f"0.tar: byte 0: 'a.{suffix}' has {bytes_} bytes, over" in output


def bomb(side: int, rows: int = 0) -> bytes:
    """A PNG of side x side black pixels in a few hundred kB; no more than `rows` are there."""
    row = zlib.compressobj(9)
    data = b"".join(row.compress(bytes(1 + side * 3)) for _ in range(rows or side)) + row.flush()

    def chunk(name: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(name + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + name + body + crc

    size = side.to_bytes(4, "big") * 2
    ends = chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + bytes([8, 2, 0, 0, 0])) + ends


@pytest.mark.parametrize("side", [9_000, pytest.param(30_000, marks=pytest.mark.full)])
def test_a_bomb_of_pixels_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    data = bomb(side)
    assert len(data) < side * side // 100
    write_tar(tmp_path / "0.tar", [("a.png", data), ("a.txt", b"title"), *samples(0, 1)])
    output = limited(f"""
    index_tars(Path({str(tmp_path)!r}))
    row = ShardSet(Path({str(tmp_path)!r})).items.iloc[0]
    assert (row.status, row.has_image) == ("packed", False)
    print(row.reason)""")
    # Over Pillow's own cap its word comes first, which is of the number of pixels alone.
    size = f"({side} x {side}|{side * side}) pixels, over max_pixels"
    assert re.search(rf"^photo a\.png: {size}$", output, re.MULTILINE)
    (tmp_path / "bomb.png").write_bytes(data)
    output = limited(f"decode_photo(Path({str(tmp_path / 'bomb.png')!r}).read_bytes(), 224)")
    assert re.search(rf"^PhotoRefused: {size}$", output, re.MULTILINE)


@pytest.mark.parametrize(
    ("side", "pixels"), [(9_000, "9000 x 9000"), (13_000, "13000 x 13000"), (30_000, "900000000")]
)
def test_too_many_pixels_are_reported_below_and_above_pillows_cap(side: int, pixels: str) -> None:
    with pytest.raises(PhotoRefused, match=f"^{pixels} pixels, over max_pixels$"):
        decode_photo(bomb(side, rows=1), 224)
    with pytest.raises(PhotoRefused, match=f"^{pixels} pixels, over max_pixels$"):
        prepare_photo(bomb(side, rows=1), PackOptions())


def limited(code: str) -> str:
    """What `code` prints and raises in a process that may allocate MEMORY bytes."""
    lines = "\n".join(line.strip() for line in code.strip().splitlines())
    body = (
        "import resource; from pathlib import Path; from shards.pack.index_tars import index_tars\n"
        "from shards.read.shard_set import ShardSet\n"
        "from shards.photos.decode import decode_photo\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n" + "\n".join(f"    {line}" for line in lines.splitlines()) + "\n"
        "except Exception as error: print(type(error).__name__ + ': ' + str(error))\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "assert used < 60_000, f'{used} kB'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", body], capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_archives_in_archives_are_refused(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner", samples(0, 1)).read_bytes()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(1 << 22))
    for suffix, data in (("tar", inner), ("zip", zipped.getvalue())):
        write_tar(tmp_path / "t" / "0.tar", [("a.txt", b"t"), (f"a.{suffix}", data)])
        with pytest.raises(Corrupt, match=rf"'a\.{suffix}' is of an unknown kind"):
            index_tars(tmp_path / "t")
        write_tar(tmp_path / "t" / "0.tar", [("a.txt", b"t"), ("a.jpg", data)])
        index_tars(tmp_path / "t")
        assert "not a readable photo" in ShardSet(tmp_path / "t").items.reason[0]
        for path in (tmp_path / "t").iterdir():
            path.unlink()


def test_json_that_exhausts_a_parser_is_refused(tmp_path: Path) -> None:
    for data in (b"[" * 500_000, b'{"a":' * 100_000, b'{"posting_id": ' + b"9" * 9_999 + b"}"):
        write_tar(tmp_path / "0.tar", [("a.json", data)])
        with pytest.raises(Corrupt, match=r"0\.tar: byte 0: item 'a': json cannot be read"):
            index_tars(tmp_path)


def test_photos_refused_at_reading_name_the_reason() -> None:
    for data in (b"", b"no photo", pickle.dumps(1), photo(0)[:200], bomb(9_000)):
        with pytest.raises(ValueError, match=r"photo|pixels|bytes"):
            decode_photo(data, 224)


# ── indices made to do harm, their checksum right


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    write_tar(tmp_path / "0.tar", samples(0, 4))
    index_tars(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("field", "value"),
    [("jpg_size", 0xFFFFFFFE), ("jpg_at", 2**64 - 1), ("jpg_at", 2**63), ("txt_at", 10**12)],
)
def test_an_index_that_points_outside_its_tar_is_refused(
    indexed: Path, field: str, value: int
) -> None:
    index = read_index(indexed / "0.idx")
    records = index.records.copy()
    records[field][1] = value
    write_index(indexed / "0.idx", index.header, records)
    vouch_again(indexed)
    with pytest.raises(Corrupt, match=r"0\.idx: a member (jpg|txt) that lies outside the tar"):
        ShardSet(indexed).reader()


@pytest.mark.parametrize("member", ["jpg", "txt", "cls"])
def test_a_member_may_end_where_its_tar_ends_and_not_a_byte_behind(
    indexed: Path, member: str
) -> None:
    index, tar_bytes = read_index(indexed / "0.idx"), (indexed / "0.tar").stat().st_size
    for beyond in (0, 1):
        records = index.records.copy()
        records[f"{member}_at"][2] = tar_bytes - int(records[f"{member}_size"][2]) + beyond
        write_index(indexed / "0.idx", index.header, records)
        if not beyond:
            assert len(read_index(indexed / "0.idx").records) == 4
            continue
        with pytest.raises(Corrupt, match=f"a member {member} that lies outside the tar"):
            read_index(indexed / "0.idx")


@pytest.mark.parametrize(
    "change",
    [{"titles": []}, {"titles": None}, {"splits": {}}, {"splits": {"train": 4}}, {"splits": 4},
     {"posting_ids": ["x"] * 5}, {"tar_bytes": "x"}, {"tar_bytes": None}],
    ids=str,
)  # fmt: skip
def test_an_index_whose_parts_do_not_fit_is_refused(indexed: Path, change: dict) -> None:
    index = read_index(indexed / "0.idx")
    write_index(indexed / "0.idx", index.header | change, index.records)
    with pytest.raises(Corrupt, match=r"0\.idx: "):
        ShardSet(indexed).reader()
