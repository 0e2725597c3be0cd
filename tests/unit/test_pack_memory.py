"""The memory of a pack, which the number of postings does not set."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, sys
from pathlib import Path
from shards import packer, scratch, seal
from shards.options import PackOptions

scratch.CACHE, seal.ROW_GROUP = json.loads(sys.argv[3]) or (scratch.CACHE, seal.ROW_GROUP)
packer.pack(Path(sys.argv[1]), None, Path(sys.argv[2]), PackOptions(shard_items=1000))
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""
SMALL = [1_000, 2**18]


def catalogue(folder: Path, postings: int) -> Path:
    path = folder / f"{postings}.csv"
    with path.open("w") as file:
        file.write("posting_id,title,label_group,price\n")
        for n in range(postings):
            file.write(f"posting {n},title of about fifty characters number {n},g{n // 3},{n}\n")
    return path


def peak(path: Path, out: Path, buffers: list[int] | None = None) -> int:
    """Bytes of the largest resident memory of a process that packs `path`."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(out), json.dumps(buffers)],
        capture_output=True, text=True, check=True, timeout=280,
    )  # fmt: skip
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.timeout(600)
def test_memory_does_not_grow_with_the_postings(tmp_path: Path) -> None:
    # Buffers so small that 20,000 postings fill them: what grows then is of the postings.
    few, many = 20_000, 100_000
    small, large = (
        peak(catalogue(tmp_path, n), tmp_path / f"s{n}", SMALL) for n in (few, many)
    )  # fmt: skip
    print(f"{small / 2**20:.0f} MB and {large / 2**20:.0f} MB")
    assert (large - small) / (many - few) < 64
    assert large < 300e6


def test_a_shard_of_a_larger_set_takes_no_more(tmp_path: Path) -> None:
    assert peak(catalogue(tmp_path, 20_000), tmp_path / "s") < 300e6
