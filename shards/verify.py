"""Compare every byte of a shard set with what its manifest and indices say."""

from pathlib import Path

from shards import stage_files
from shards.errors import Corrupt
from shards.files import sha256_file
from shards.index import MEMBERS, read_index
from shards.packer import KIND
from shards.tar import check_member


def verify(path: Path) -> list[str]:
    """Every fault of the shard set, each naming its file; empty when all is as it was packed."""
    manifest = stage_files.open_finished(path, KIND)
    faults = []
    for name, facts in manifest["files"].items():
        file = path / name
        if not file.exists():
            faults.append(f"{file}: missing")
        elif file.stat().st_size != facts["bytes"]:
            faults.append(f"{file}: {file.stat().st_size} bytes, packed with {facts['bytes']}")
        elif sha256_file(file) != facts["sha256"]:
            faults.append(f"{file}: content differs from what was packed{_where(file)}")
    known = set(manifest["files"])
    found = [p for kind in ("tar", "idx") for p in path.glob(f"*/*.{kind}")]
    extra = {str(p.relative_to(path)) for p in found} - known
    return faults + [f"{path / name}: not part of this shard set" for name in sorted(extra)]


def _where(file: Path) -> str:
    if file.suffix != ".tar":
        return ""
    try:
        index = read_index(file.with_suffix(".idx"))
        with file.open("rb") as opened:
            for record in index.records:
                for member in MEMBERS:
                    check_member(opened, record, member, file)
    except Corrupt as fault:
        return f" ({fault})"
    return " (outside the members: a header or padding)"
