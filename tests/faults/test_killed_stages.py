"""Whatever is killed, however often: the next attempt leaves the same files and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launching import ROOT, environment, run

pytestmark = pytest.mark.timeout(3000)


@pytest.fixture(scope="module")
def stages(
    catalogue: Path,
    shard_set: Path,
    image_options: list[object],
    image_run: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[list[str], Path | None]]:
    """The command of every stage, and for those that add to a folder, the folder before."""
    folder = tmp_path_factory.mktemp("stages")
    names = ("embedding", "index", "pairs", "matches")
    embedding, index, pairs, matches = (folder / name for name in names)
    photos, table = catalogue / "images", catalogue / "catalogue.csv"
    verbs = {
        "pack": ["pack", table, "--images", photos, "--size", 48, "--workers", 1],
        "train": ["train", "image", *image_options, "--device", "cpu"],
        "embed": ["embed", "--shards", shard_set, "--image", image_run, "--workers", 0],
        "index": ["index", embedding],
        "join": ["join", embedding, "--index", index, "--device", "cpu"],
        "match": ["match", pairs],
    }
    for verb, out in zip(("embed", "index", "join", "match"), names, strict=True):
        run(1, *verbs[verb], "--out", folder / out)
    found = {verb: ([*map(str, words), "--out", "{out}"], None) for verb, words in verbs.items()}
    return found | {verb: ([verb, "{out}"], matches) for verb in ("evaluate", "report")}


@pytest.mark.parametrize(
    ("some", "chains"),
    [
        (("index", "join", "match", "evaluate", "report"), 3),
        pytest.param(("pack", "train", "embed"), 6, marks=pytest.mark.full),
        pytest.param(("index", "join", "match", "evaluate", "report"), 20, marks=pytest.mark.full),
    ],
)
def test_a_chain_of_kills_leaves_the_same_files(
    some: tuple[str, ...], chains: int, stages: dict, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = tmp_path_factory.mktemp("killed") / "plan.json"
    plan.write_text(json.dumps({stage: stages[stage] for stage in some}, default=str))
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killed_stages", plan, str(chains)],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert len(outcomes) == chains * len(some)
    assert [outcome for outcome in outcomes if outcome[2]] == []
    assert {stage for stage, points, _ in outcomes if points} == set(some)
    assert sum(len(points) for _, points, _ in outcomes) > len(outcomes)  # most were killed
