"""The strict scan: what it reads as tarfile does, and what it refuses where tarfile is silent."""

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest

from shards.storage.errors import Corrupt
from shards.tar.scan import members
from tests.support.tars import samples, write_tar

FORMS = (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)


def found(tar: Path) -> list[tuple[str, int, int]]:
    return [(member.name, member.at, member.size) for member in members(tar)]


def found_by_tarfile(tar: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(tar) as opened:
        return [(info.name, info.offset_data, info.size) for info in opened if info.isreg()]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar", samples(0, 6))


@pytest.mark.parametrize("form", FORMS)
def test_the_scan_finds_what_tarfile_finds(tmp_path: Path, form: int) -> None:
    names = ["a.txt", "deep/" * 15 + "b.txt", "x" * 90 + ".txt", "d/ with blanks .txt"]
    if form != tarfile.USTAR_FORMAT:
        names += ["é–中.txt", "n" * 300 + ".txt", "deep/" * 60 + "c.txt"]
    tar = write_tar(tmp_path / "a.tar", [(n, n.encode() * k) for k, n in enumerate(names)], form)
    assert found(tar) == found_by_tarfile(tar)
    assert [name for name, _, _ in found(tar)] == names


def test_pax_sizes_and_base_256_sizes_are_understood(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "plain.tar", [("a.txt", b"x" * 700), ("b.txt", b"y")])
    expected = found(plain)
    data = bytearray(plain.read_bytes())
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    sealed(data, 0)
    assert found(written(tmp_path / "base256.tar", data)) == expected
    pax = tmp_path / "pax.tar"
    with tarfile.open(pax, "w", format=tarfile.PAX_FORMAT) as opened:
        for name, size in (("a.txt", 700), ("b.txt", 1)):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = size, {"size": str(size), "comment": "ü\n=x"}
            opened.addfile(info, io.BytesIO(b"x" * size))
    data = bytearray(pax.read_bytes())
    data[1024 + 124 : 1024 + 136] = bytes(12)  # the header itself says nothing of the size
    sealed(data, 1024)
    assert found(written(pax, data)) == [("a.txt", 1536, 700), ("b.txt", 4096, 1)]


def test_sums_of_signed_characters_are_understood(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("é.txt", b"x")], tarfile.GNU_FORMAT)
    expected, data = found(tar), bytearray(tar.read_bytes())
    high = sum(byte > 127 for byte in data[:148] + data[156:512])
    total = int(bytes(data[148:154]), 8) - 256 * high
    assert high
    data[148:156] = b"%06o\0 " % total
    assert found(written(tar, data)) == expected


def test_folders_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "in" / "f").mkdir(parents=True)
    (tmp_path / "in" / "f" / "a.txt").write_text("x")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "in", ".")
    assert [name for name, _, _ in found(tmp_path / "a.tar")] == ["./f/a.txt"]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def sealed(data: bytearray, at: int) -> None:
    """Make the checksum of a header fit what was changed in it."""
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def in_header(tar: Path, at: int, place: int, data: bytes) -> Path:
    """The tar with other bytes in a header, its checksum right."""
    whole = bytearray(tar.read_bytes())
    whole[at + place : at + place + len(data)] = data
    sealed(whole, at)
    return written(tar, whole)


def test_a_name_fills_its_field(tmp_path: Path) -> None:
    for length in (99, 100):
        name = "n" * (length - 4) + ".txt"
        assert [n for n, _, _ in found(write_tar(tmp_path / "a.tar", [(name, b"x")]))] == [name]
    prefix = "p" * 155
    tar = write_tar(tmp_path / "a.tar", [(f"{prefix}/{name}", b"x")])
    assert [n for n, _, _ in found(tar)] == [f"{prefix}/{name}"]


def test_names_that_are_none_are_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    with pytest.raises(Corrupt, match="byte 0: an empty name or one over 4096 bytes: ''"):
        found(in_header(tar, 0, 0, bytes(100)))
    for name, whole in (("n" * 4092 + ".txt", True), ("n" * 4093 + ".txt", False)):
        tar = write_tar(tmp_path / "a.tar", [(name, b"x")], tarfile.PAX_FORMAT)
        if whole:
            assert [n for n, _, _ in found(tar)] == [name]
        else:
            with pytest.raises(Corrupt, match="an empty name or one over 4096 bytes"):
                found(tar)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as opened:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = {"path": "a\0b.txt"}
        opened.addfile(info)
    with pytest.raises(Corrupt, match="an empty name"):
        found(tmp_path / "a.tar")
    tar = write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    with pytest.raises(Corrupt, match="is not UTF-8"):
        found(in_header(tar, 0, 0, b"\xff"))


def test_sizes_that_are_none_are_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    with pytest.raises(Corrupt, match="byte 0: a negative number"):
        found(in_header(tar, 0, 124, b"\xff" * 12))
    tar = write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    with pytest.raises(Corrupt, match=r"byte 0: no tar header, or a damaged one .no octal"):
        found(in_header(tar, 0, 124, b"00000000009\0"))
    tar = write_tar(tmp_path / "a.tar", [("d", b"x")])
    with pytest.raises(Corrupt, match="byte 0: the folder 'd' declares 1 bytes"):
        found(in_header(tar, 0, 156, b"5"))


def test_a_member_may_fill_the_file_and_no_block_more(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    length = tar.stat().st_size
    for size, message in (
        (length - 512, "ends without the two zero blocks"),
        (length - 511, f"'a.txt' declares {length - 511} bytes, more than is there"),
    ):
        with pytest.raises(Corrupt, match=message):
            found(in_header(tar, 0, 124, b"%011o\0" % size))


def test_data_behind_the_end_is_named_to_the_byte(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    for place in (1536, 2047, 5000, 10_239):
        data = bytearray(tar.read_bytes())
        data[place] = 1
        other = written(tmp_path / "b.tar", data)
        with pytest.raises(Corrupt, match=f"byte 1024: a zero block.*byte {place} holds data"):
            found(other)
    large = tar.read_bytes() + bytes(2**21)
    with pytest.raises(Corrupt, match=f"byte {len(large) - 5} holds data"):
        found(written(tmp_path / "b.tar", large[:-5] + b"x" + bytes(4)))
    with pytest.raises(Corrupt, match="cut inside the zeros at the end"):
        found(written(tmp_path / "b.tar", large[:-5]))


# ── damage


def headers(tar: Path) -> list[int]:
    return [member.header_at for member in members(tar)]


@pytest.mark.parametrize("trials", [60, pytest.param(2000, marks=pytest.mark.full)])
def test_any_flipped_bit_in_a_header_is_refused(tar: Path, trials: int) -> None:
    draw, whole = random.Random(trials), tar.read_bytes()
    starts, expected, silent, harmless = headers(tar), found(tar), 0, 0
    for _ in range(trials):
        data, at, place = bytearray(whole), draw.choice(starts), draw.randrange(512)
        data[at + place] ^= 1 << draw.randrange(8)
        tar.write_bytes(data)
        if 148 <= place < 156 and field(data, at) == field(whole, at):
            # The filling of the checksum's own field: its number stays what it was.
            harmless += 1
            assert found(tar) == expected
            continue
        with pytest.raises(Corrupt, match=rf"a\.tar: byte {at}: "):
            found(tar)
        silent += at > 0 and len(found_by_tarfile(tar)) < 18
    assert silent  # tarfile ends there without a word
    assert harmless < trials / 50


def field(data: bytes, at: int) -> bytes:
    return data[at + 148 : at + 156].partition(b"\0")[0].strip(b" 0")


def test_every_cut_is_refused(tar: Path) -> None:
    whole = tar.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in {*range(0, len(whole), 512), *headers(tar), 1, 511, end, len(whole) - 1}:
        tar.write_bytes(whole[:length])
        zeros = length % 512 == 0 and length - 1024 >= -(-end // 512) * 512
        if zeros:  # the zeros behind the two blocks of the end only fill up a tape record
            assert len(found(tar)) == 18
            continue
        with pytest.raises(Corrupt, match=r"a\.tar: byte \d+: "):
            found(tar)


def test_a_cut_at_a_member_says_how_to_mend_it(tar: Path) -> None:
    whole, at = tar.read_bytes(), headers(tar)[9]
    tar.write_bytes(whole[:at])
    with pytest.raises(Corrupt, match=rf"byte {at}: ends without the two zero blocks"):
        found(tar)
    tar.write_bytes(whole[:at] + bytes(1024))
    assert len(found(tar)) == 9


@pytest.mark.parametrize("number", [0, 1, 8, 17])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_zeroed_header_is_refused(tar: Path, number: int, blocks: int) -> None:
    data, at = bytearray(tar.read_bytes()), headers(tar)[number]
    data[at : at + 512 * blocks] = bytes(512 * blocks)
    tar.write_bytes(data)
    if number == 17 and blocks == 2:
        # The last member was one block long: what is left is a whole tar of the others.
        assert len(found(tar)) == 17
        return
    with pytest.raises(Corrupt, match=rf"byte {at}: a zero block, where archives end, but byte"):
        found(tar)


def test_joined_tars_are_refused(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes() * 2)
    with pytest.raises(Corrupt, match="joined tars"):
        found(tar)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"<html>" + b"not found " * 300, "no tar header"),
        (gzip.compress(b"x" * 9000, mtime=0), "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 2000, "compressed with zstd"),
        (b"BZh9" + b"x" * 2000, "compressed with bzip2"),
        (b"\xfd7zXZ\0" + b"x" * 2000, "compressed with xz"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(Corrupt, match=f"a.tar: byte 0: {message}"):
        found(written(tmp_path / "a.tar", data))


def test_broken_extended_headers_are_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("é" * 90 + ".txt", b"x")], tarfile.PAX_FORMAT)
    whole = tar.read_bytes()
    assert whole[156:157] == b"x"
    for old, new in ((b" path=", b" path-"), (b"197 ", b"999 "), (b"\n", b"x")):
        data = whole[:512] + whole[512:1024].replace(old, new, 1) + whole[1024:]
        if data != whole:
            with pytest.raises(Corrupt, match=r"byte 0: a broken record"):
                found(written(tar, data))
    with pytest.raises(Corrupt, match="without its member"):
        found(written(tar, whole[:1024] + bytes(1024)))
