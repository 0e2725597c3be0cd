"""Several packs build one set: every number of tasks and workers ends in the same bytes."""

import json
import shutil
from pathlib import Path

import pytest

from shards.catalogue.rows import Catalogue
from shards.pack.pack import Task, pack
from shards.pack.plan import Plan
from shards.pack.seal import seal
from shards.read.shard_set import ShardSet
from shards.storage.errors import BadInput, Corrupt
from tests.support.packing import OPTIONS, finish, started, tree

# ── several tasks and several workers


def test_one_worker_eight_workers_and_four_tasks_make_the_same_set(
    few: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    with started(few, tmp_path / "workers", [["--workers", "8"]]) as [process]:
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 0, output
    tasks = [["--task", str(n), "--of", "4"] for n in range(4)]
    with started(few, tmp_path / "tasks", tasks) as processes:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * 4, outputs
    assert tree(tmp_path / "workers") == tree(tmp_path / "tasks") == undisturbed
    prints = {ShardSet(tmp_path / name).fingerprint for name in ("workers", "tasks")}
    assert len(prints) == 1
    # Who comes last finishes the set, and whoever comes later finds it finished.
    waiting = [output for output in outputs if "waits for the others" in output]
    packed = [output for output in outputs if "60 postings packed" in output]
    assert len(waiting) + len(packed) == 4
    assert packed
    assert json.loads((tmp_path / "tasks" / "status.json").read_text())["status"] == "done"
    assert not (tmp_path / "tasks" / ".pack").exists()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_any_task_may_come_first_and_the_last_one_finishes(
    few: Path, undisturbed: dict[str, str], tmp_path: Path, order: tuple[int, ...]
) -> None:
    out, images = tmp_path / "s", few.parent / "images"
    for number in order:
        assert not (out / "manifest.json").exists()
        counts = pack(few, images, out, OPTIONS, task=Task(number, 3))
        status = json.loads((out / "status.json").read_text())
        if number != order[-1]:
            assert counts is None
            assert f"task {number} of 3: " in status["reason"]
            assert "waits for the others" in status["reason"]
    assert counts is not None
    assert status["status"] == "done"
    assert tree(out) == undisturbed
    assert pack(few, images, out, OPTIONS, task=Task(1, 3)) == counts


@pytest.mark.parametrize(("number", "of"), [(3, 3), (-1, 3), (0, 0)])
def test_a_task_that_is_not_there_is_refused(
    few: Path, tmp_path: Path, number: int, of: int
) -> None:
    with pytest.raises(BadInput, match=f"--task {number} --of {of}"):
        pack(few, few.parent / "images", tmp_path / "s", OPTIONS, task=Task(number, of))
    assert not (tmp_path / "s").exists()


def test_a_task_on_a_node_without_the_photos_says_so(
    few: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "s"
    folder, elsewhere = tmp_path / "mount", tmp_path / "elsewhere"
    shutil.copytree(few.parent / "images", folder)
    catalogue = tmp_path / "few.csv"
    catalogue.write_bytes(few.read_bytes())
    assert pack(catalogue, folder, out, OPTIONS, task=Task(0, 2)) is None
    before = {path.name for path in out.glob("*/*.tar")}
    folder.rename(elsewhere)
    with pytest.raises(BadInput, match="mount: no such folder of photos on"):
        pack(catalogue, folder, out, OPTIONS, task=Task(1, 2))
    folder.mkdir()  # the place where nothing is mounted
    with pytest.raises(BadInput, match=r"mount: on .* is the right folder mounted"):
        pack(catalogue, folder, out, OPTIONS, task=Task(1, 2))
    assert {path.name for path in out.glob("*/*.tar")} == before
    folder.rmdir()
    elsewhere.rename(folder)
    assert pack(catalogue, folder, out, OPTIONS, task=Task(1, 2)) is not None
    ours = {name: digest for name, digest in tree(out).items() if name.endswith(".tar")}
    assert ours.items() <= undisturbed.items()


def test_a_shard_that_disagrees_with_the_plan_is_named_at_the_seal(
    few: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out, images = tmp_path / "s", few.parent / "images"
    assert pack(few, images, out, OPTIONS, task=Task(0, 2)) is None
    one, other = sorted(out.glob("*/*.tar"))[:2]
    facts = [out / ".pack" / f"{tar.parent.name}-{tar.stem}.parquet" for tar in (one, other)]
    facts[0].write_bytes(facts[1].read_bytes())
    with pytest.raises(Corrupt, match=f"{one}: holds other postings than were planned"):
        pack(few, images, out, OPTIONS, task=Task(1, 2))
    assert not (out / "manifest.json").exists()
    one.unlink()
    one.with_suffix(".idx").unlink()
    assert finish(few, out) == undisturbed


def test_a_bit_that_flips_before_the_seal_is_named_and_never_becomes_the_truth(
    few: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out, images = tmp_path / "s", few.parent / "images"
    assert pack(few, images, out, OPTIONS, task=Task(0, 2)) is None
    tar = sorted(out.glob("*/*.tar"))[0]
    flipped = bytearray(tar.read_bytes())
    flipped[len(flipped) // 3] ^= 4
    tar.write_bytes(flipped)
    message = rf"{tar}: has changed since it was written; remove it and its \.idx, and run the same"
    for _ in range(2):
        with pytest.raises(Corrupt, match=message):
            pack(few, images, out, OPTIONS, task=Task(1, 2))
        assert not (out / "manifest.json").exists()
    tar.unlink()
    tar.with_suffix(".idx").unlink()
    assert finish(few, out) == undisturbed


def test_a_catalogue_that_changes_under_the_pack_is_not_finished(few: Path, tmp_path: Path) -> None:
    lines = few.read_text().splitlines(keepends=True)
    catalogue, out = tmp_path / "few.csv", tmp_path / "s"
    catalogue.write_text("".join(lines))

    def changed(plan: Plan, source: Catalogue, *rest: object) -> dict:
        catalogue.write_text("".join([lines[0], *reversed(lines[1:])]))
        return seal(plan, source, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shards.pack.pack.seal", changed)
        with pytest.raises(BadInput, match=r"few\.csv: has changed while it was packed"):
            pack(catalogue, few.parent / "images", out, OPTIONS)
    assert not (out / "manifest.json").exists()
