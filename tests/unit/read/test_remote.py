"""Shard sets at a URL: read as from disk, tried again, refused by name, never mixed up."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader

from dist_train.distributed import stage
from shards.order.global_order import Order
from shards.read import remote
from shards.read.shard_set import Item, ItemReader, ShardSet
from shards.read.verify import verify
from shards.storage.errors import BadInput, Corrupt, Unreachable
from shards.storage.files import sha256_file
from shards.storage.stage_files import MANIFEST, STAGE, fingerprint_of, finish
from tests.support.serving import Serving, serve
from tests.support.shard_sets import all_items, cached_files, tar_files

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]


@pytest.fixture
def own(sets: Path, cache: Path, tmp_path: Path) -> Iterator[Serving]:
    """A server of a copy of the sets, to be damaged."""
    shutil.copytree(sets, tmp_path / "sets")
    with serve(tmp_path / "sets") as serving:
        yield serving


@pytest.fixture(scope="module")
def bucket(sets: Path) -> Iterator[str]:
    """The address of the sets on a server that speaks S3."""
    from moto.server import ThreadedMotoServer

    s3 = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        files = fsspec.filesystem("s3")
        files.mkdir("sets")
        for name in "ab":
            files.put(str(sets / name), f"sets/{name}", recursive=True)
        yield "s3://sets"
    s3.stop()


def everything_of(location: object) -> tuple[list[Item], list[str]]:
    return all_items(location), ShardSet(location).items.posting_id.tolist()


def _as_is(batch: list[Item]) -> list[Item]:
    return batch


def in_global_order(reader: ItemReader, workers: int) -> list[Item]:
    positions = Order(len(reader), 7).at(np.arange(len(reader)))
    loader = DataLoader(
        reader, batch_size=16, sampler=positions.tolist(), num_workers=workers, collate_fn=_as_is,
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    return [item for batch in loader for item in batch]


# ── read as from disk


@pytest.mark.parametrize("kind", ["http", "s3"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.timeout(90)
def test_a_set_at_a_url_is_read_as_from_disk(
    kind: str, workers: int, sets: Path, server: Serving, request: pytest.FixtureRequest
) -> None:  # fmt: skip
    base = server.url if kind == "http" else request.getfixturevalue("bucket")
    here, there = ShardSet(sets / "a"), ShardSet(f"{base}/a")
    assert there.fingerprint == here.fingerprint
    assert there.items.equals(here.items)  # and connections are open when the workers start
    found = in_global_order(there.reader(), workers)
    assert found == in_global_order(here.reader(), 0)
    assert len(found) == here.manifest["counts"]["packed"]
    for posting_id in here.packed.posting_id[::40]:
        assert there.photo(posting_id) == here.photo(posting_id)


def test_the_forked_worker_asks_the_server_itself(sets: Path, server: Serving) -> None:
    reader = ShardSet(f"{server.url}/a").reader()
    assert not any(path.endswith(".tar") for path in server.started)  # tars when first read
    in_global_order(reader, 2)
    requested = {path for path in server.started if path.endswith(".tar")}
    assert requested == {str(tar.relative_to(sets)) for tar in tar_files(sets / "a")}
    assert reader._open == {}


def test_other_file_systems(sets: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(str(sets / "a"), "/memory-set", recursive=True)
    assert all_items("memory://memory-set") == all_items(sets / "a")
    assert all_items(f"file://{sets}/a") == all_items(str(sets / "a"))
    archive = shutil.make_archive(str(tmp_path / "a"), "zip", sets)
    assert all_items(f"zip://a::{archive}") == all_items(sets / "a")


def test_a_server_without_ranges(
    sets: Path, server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK", 10_000)
    server.ranges = False
    assert all_items(f"{server.url}/a") == all_items(sets / "a")


# ── names


def test_sets_and_splits_that_share_names_are_never_mixed(sets: Path, server: Serving) -> None:
    shared = {str(tar.relative_to(sets / "a")) for tar in tar_files(sets / "a")}
    assert shared & {str(tar.relative_to(sets / "b")) for tar in tar_files(sets / "b")}
    hashes = [sha256_file(tar) for name in "ab" for tar in tar_files(sets / name)]
    assert len(set(hashes)) == len(hashes)
    for _ in range(2):  # downloaded, then from the cache
        for split in ("train", "val"):
            for name in "ba":
                found = all_items(f"{server.url}/{name}", (split,))
                assert found == all_items(sets / name, (split,))
    assert max(server.started[path] for path in server.started if path.endswith("tar")) == 1


def test_what_has_the_same_bytes_is_downloaded_once(own: Serving, cache: Path) -> None:
    shutil.copytree(own.folder / "a", own.folder / "copy")
    all_items(f"{own.url}/a")
    names = {path.name for path in cached_files(cache)}
    assert all_items(f"{own.url}/copy") == all_items(own.folder / "a")
    assert {path.name for path in cached_files(cache)} == names
    assert all(sha256_file(path) == path.name for path in cached_files(cache))


# ── a bad connection


@pytest.mark.parametrize("fault", ["500", "cut"])
@pytest.mark.parametrize("times", [1, 4])
def test_what_is_cut_off_is_requested_again(
    fault: str, times: int, sets: Path, server: Serving, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    server.broken, server.faults = lambda path: fault, times
    assert all_items(f"{server.url}/a", ("train",)) == all_items(sets / "a", ("train",))
    assert server.faults == 0
    warned = [record.message for record in caplog.records if "try" in record.message]
    assert len(warned) == times
    assert f"try {times + 1} of 5" in warned[-1]


def test_an_answer_that_may_be_another_in_a_moment_is_requested_again(
    sets: Path, server: Serving
) -> None:
    """Too early, too many requests (RFC 6585), a server that is overloaded or starts anew."""
    whole = (sets / "a" / "stage.json").read_bytes()
    for tries, code in enumerate((408, 425, 429, 500, 502, 503, 504), 1):
        server.broken, server.faults = lambda path, code=code: str(code), 1
        assert remote.Remote(f"{server.url}/a").read("stage.json") == whole
        assert server.started["a/stage.json"] == 2 * tries


def test_an_answer_that_stays_the_same_is_taken_at_once(server: Serving) -> None:
    for tries, code in enumerate((400, 401, 403, 405, 410, 424, 426, 428, 451), 1):
        server.broken = lambda path, code=code: str(code)
        with pytest.raises(Unreachable, match=rf"stage\.json: .*{code}.*gave up after 1 try"):
            ShardSet(f"{server.url}/a")
        assert server.started["a/stage.json"] == tries


def test_a_part_that_came_is_not_requested_again(
    sets: Path, server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK", 4096)
    biggest = max(tar_files(sets / "a"), key=lambda tar: tar.stat().st_size)
    path = str(biggest.relative_to(sets))
    left = iter([""] * 5 + ["cut"] * 5)
    server.broken = lambda requested: next(left, "") if requested == path else ""
    with pytest.raises(Unreachable, match="gave up after 5 tries"):
        all_items(f"{server.url}/a")
    assert (server.started[path], server.resumed[path]) == (1, 4 + 5)
    assert all_items(f"{server.url}/a") == all_items(sets / "a")
    pieces = -(-biggest.stat().st_size // 4096)
    assert (server.started[path], server.resumed[path]) == (1, 5 + pieces - 1)


def test_a_server_that_never_answers_well_is_given_up(server: Serving) -> None:
    server.broken = lambda path: "500" if path.endswith(".idx") else ""
    with pytest.raises(Unreachable, match=r"a/train/000000\.idx: .*500.* gave up after 5 tries"):
        all_items(f"{server.url}/a")
    assert max(server.started.values()) == 5
    port = server.url.rpartition(":")[2]
    with pytest.raises(Unreachable, match=rf"127\.0\.0\.1:{int(port) + 1}/a/stage.json: .*5 tries"):
        ShardSet(f"http://127.0.0.1:{int(port) + 1}/a")


# ── wrong content


@pytest.mark.parametrize("end", [".tar", ".idx", "items.parquet"])
def test_wrong_bytes_are_refused_with_both_hashes_and_not_kept(
    end: str, sets: Path, server: Serving, cache: Path
) -> None:
    server.broken = lambda path: "wrong" if path.endswith(end) else ""
    with pytest.raises(
        Corrupt, match=rf"{server.url}/a/.*{end}: sha256 \w{{64}}, in its manifest"
    ) as raised:
        everything_of(f"{server.url}/a")
    bad = next(path for path, count in server.started.items() if count == 3)
    assert sha256_file(sets / bad) in str(raised.value)
    kept = {path.name for path in cached_files(cache)}
    assert all(sha256_file(path) == path.name for path in cached_files(cache))
    assert sha256_file(sets / bad) not in kept
    server.broken = lambda path: ""
    assert all_items(f"{server.url}/a") == all_items(sets / "a")


def test_one_wrong_answer_is_downloaded_again(sets: Path, server: Serving) -> None:
    server.broken, server.faults = lambda path: "wrong" if path.endswith(".tar") else "", 2
    assert all_items(f"{server.url}/a") == all_items(sets / "a")


@pytest.mark.parametrize("end", ["stage.json", "manifest.json", ".idx", ".tar"])
def test_an_error_page_with_200_is_refused(end: str, server: Serving, cache: Path) -> None:
    server.broken = lambda path: "page" if path.endswith(end) else ""
    with pytest.raises((Corrupt, Unreachable), match=rf"{server.url}/a/\S*{end}: ") as raised:
        all_items(f"{server.url}/a")
    assert "not JSON" in str(raised.value) or "starting b'<html>" in str(raised.value)
    assert all(path.stat().st_size == 0 for path in cached_files(cache) if path.suffix == ".part")
    assert all(
        sha256_file(path) == path.name for path in cached_files(cache) if path.suffix != ".part"
    )


def test_a_tar_cut_changed_or_gone_at_the_server(own: Serving) -> None:
    tar = tar_files(own.folder / "a")[0]
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    with pytest.raises(Unreachable, match=f"{tar.name}: .* bytes came where {len(whole)}"):
        all_items(f"{own.url}/a")
    assert any("bytes, packed with" in fault for fault in verify(f"{own.url}/a"))
    tar.write_bytes(whole[:700] + bytes([whole[700] ^ 4]) + whole[701:])
    with pytest.raises(Corrupt, match="sha256"):
        all_items(f"{own.url}/a")
    name = str(tar.relative_to(own.folder))
    assert verify(f"{own.url}/a") == [f"{own.url}/{name}: content differs from what was packed"]
    tar.unlink()
    assert verify(f"{own.url}/a") == [f"{own.url}/{name}: missing; restore it there"]
    with pytest.raises(Corrupt, match=f"{name}: missing"):
        all_items(f"{own.url}/a")
    tar.write_bytes(whole)
    assert verify(f"{own.url}/a") == []


def test_a_manifest_whose_counts_were_changed_is_refused(own: Serving) -> None:
    path = own.folder / "a" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["counts"]["classes"] += 1
    path.write_text(json.dumps(manifest))
    message = rf"{own.url}/a/manifest\.json: differs from its own sha256"
    with pytest.raises(Corrupt, match=message):
        ShardSet(f"{own.url}/a")
    assert [re.match(message, fault) is not None for fault in verify(f"{own.url}/a")] == [True]


@pytest.mark.parametrize(
    ("name", "was", "now", "message"),
    [
        (STAGE, '"started": "2', '"started": "3', "content differs from what was written; restore"),
        ("status.json", '"done"', '"gone"', "is 'gone' although the stage is finished"),
        ("status.json", "{", "[", "not JSON"),
    ],
)
def test_verify_finds_at_a_url_what_it_finds_in_the_folder(
    own: Serving, name: str, was: str, now: str, message: str
) -> None:
    path = own.folder / "a" / name
    assert was in path.read_text()
    path.write_text(path.read_text().replace(was, now, 1))
    (fault,) = verify(f"{own.url}/a")
    assert fault.startswith(f"{own.url}/a/{name}: {message}")
    path.unlink()
    if name != STAGE:
        fault = f"{own.url}/a/{name}: is '' although the stage is finished"
        assert verify(f"{own.url}/a") == [fault]


def test_a_tar_changed_before_its_seal_is_reported_at_a_url_too(own: Serving) -> None:
    folder = own.folder / "a"
    tar = tar_files(folder)[0]
    flipped = bytearray(tar.read_bytes())
    flipped[600] ^= 4
    tar.write_bytes(flipped)
    manifest = json.loads((folder / MANIFEST).read_text())
    finish(folder, manifest["counts"], [folder / file for file in manifest["files"]])
    (fault,) = verify(f"{own.url}/a")
    assert fault.startswith(f"{own.url}/{tar.relative_to(own.folder)}: had changed before the set")


def test_a_hostile_manifest_leads_nowhere(own: Serving, cache: Path, tmp_path: Path) -> None:
    path = own.folder / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    name = next(iter(manifest["files"]))
    for facts in ({"sha256": "../../../../escaped", "bytes": 4}, {"sha256": "0" * 64}, "x"):
        path.write_text(json.dumps(manifest | {"files": manifest["files"] | {name: facts}}))
        with pytest.raises(Corrupt, match=r"manifest\.json: does not fit its fingerprint"):
            ShardSet(f"{own.url}/a")
        _sign(path)
        with pytest.raises(Corrupt, match=r"manifest\.json: file .* has no path below it"):
            ShardSet(f"{own.url}/a")
    files = manifest["files"] | {"../../b/train/000000.tar": manifest["files"][name]}
    path.write_text(json.dumps(manifest | {"files": files}))
    _sign(path)
    with pytest.raises(Corrupt, match="has no path below it"):
        ShardSet(f"{own.url}/a")
    assert not list(tmp_path.rglob("escaped*"))
    assert not cached_files(cache)


def _sign(path: Path) -> None:
    manifest, recorded = (
        json.loads((path.parent / name).read_text()) for name in (MANIFEST, STAGE)
    )
    manifest["fingerprint"] = fingerprint_of(recorded, manifest["files"])
    path.write_text(json.dumps(manifest))


# ── what is no set, and secrets


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense://x/y", "Protocol not known.*install the fsspec file system for nonsense"),
        ("memory://nothing/here", r"not a shard set directory \(no stage.json\)"),
        ("pipe:cat /etc/passwd", "not a shard set directory"),
    ],
)
def test_what_is_no_set_is_refused(url: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ShardSet(url)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # what an import of it finds: nothing
    with pytest.raises(BadInput, match=r"gs://bucket/set: .*install gcsfs"):
        ShardSet("gs://bucket/set")


def test_users_and_queries_are_never_shown_nor_recorded(
    server: Serving, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.url.replace("//", "//user:hush@") + "/a?signature=hush"
    assert all_items(url) == all_items(f"{server.url}/a")
    assert "hush" not in json.dumps(stage.parents_for(tmp_path, shards=url))
    server.broken = lambda path: "500"
    with pytest.raises(Unreachable, match="gave up") as raised:
        ShardSet(url)
    assert "hush" not in str(raised.value) + caplog.text
