"""Compare every byte of a shard set with its manifest and indices."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from shards.read.location import Location, Mirror, open_files
from shards.storage import stage_files
from shards.storage.errors import Corrupt
from shards.storage.files import sha256_file
from shards.storage.stage_files import FileFacts
from shards.storage.workers import each
from shards.tar.index import misfit, read_index
from shards.tar.layout import KIND, is_tar
from shards.tar.scan import members
from shards.tar.write import check_members


def verify(location: Location, workers: int = 1) -> list[str]:
    """Every fault of a shard set, each naming its file; `workers` processes read a folder."""
    try:
        files = open_files(location, KIND)
        if isinstance(files, Mirror):
            return files.faults()
        faults = stage_files.faults_of(files.path)
    except Corrupt as fault:
        return [str(fault)]
    path, listed = files.path, files.manifest["files"]
    jobs = [(path, name, listed) for name in listed]
    with closing(each(_fault, jobs, workers, "verifying")) as found:
        faults += [fault for fault in found if fault]
    lying = [file for file in path.rglob("*") if is_tar(file.name) or file.suffix == ".idx"]
    extra = {str(file.relative_to(path)) for file in lying} - set(listed)
    return faults + [f"{path / name}: not part of this shard set" for name in sorted(extra)]


def _fault(path: Path, name: str, listed: Mapping[str, FileFacts]) -> str:
    """The fault of the file `name` below `path`; empty if it is intact."""
    file, facts = path / name, listed[name]
    if not file.is_file():
        return f"{file}: missing"
    sha256 = sha256_file(file)
    if sha256 == facts["sha256"]:
        index = file.with_suffix(".idx")
        if not is_tar(name) or not index.is_file():
            return ""
        return misfit(str(file), name, index.read_bytes(), listed)
    for other in listed:
        if listed[other]["sha256"] == sha256:
            return f"{file}: holds what belongs in {path / other}"
    if (size := file.stat().st_size) != facts["bytes"]:
        return f"{file}: {size} bytes, packed with {facts['bytes']}"
    damage = ""
    if is_tar(name):
        damage = " (outside the members: a header or padding)"
        try:
            check_members(file, read_index(file.with_suffix(".idx")).records)
            for _ in members(file):
                pass
        except Corrupt as fault:
            damage = f" ({fault})"
    return f"{file}: content differs from what was packed{damage}"
