"""Killed, stopped by a signal, or broken: a new start goes on, and nothing hangs."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.support.comparing import losses, metrics_written, weights
from tests.support.launching import ROOT, command, environment, run
from tests.support.processes import kill, start, wait_for

pytestmark = pytest.mark.timeout(600)


def test_signals_stop_with_a_checkpoint(
    image_options: list[object], image_run: Path, tmp_path: Path
) -> None:  # fmt: skip
    out = tmp_path / "run"
    verb = ["train", "image", *image_options, "--out", out]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        before = metrics_written(out)  # those of the attempt before stand there from the start
        process = start(1, *verb)
        wait_for(lambda before=before: metrics_written(out) > before + 1, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 3, output
        assert json.loads((out / "status.json").read_text())["status"] == "preempted"
    run(1, *verb)
    assert losses(out) == losses(image_run)
    ours, theirs = weights(out), weights(image_run)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.timeout(1600)
def test_a_pipeline_stops_in_every_stage_and_goes_on(
    catalogue: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    config = {
        "catalogue": str(catalogue / "catalogue.csv"), "images": str(catalogue / "images"),
        "out": str(tmp_path / "pipeline"), "encoders": ["image"],
        "pack": {"size": 48, "workers": 1},
        "image": {
            "encoder": {"model": str(tiny_vit), "image_size": 32}, "batch_size": 24, "epochs": 0.5,
            "workers": 0, "device": "cpu", "precision": "fp32", "validate_every": 0,
        },
        "embed": {"workers": 0, "device": "cpu"}, "join": {"device": "cpu"},
    }  # fmt: skip
    (tmp_path / "pipeline.yaml").write_text(json.dumps(config))  # JSON is YAML
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.stopped_pipeline", tmp_path / "pipeline.yaml"],
        cwd=ROOT, env=environment(), text=True, timeout=1500, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0
    *stopped, last = json.loads(done.stdout.splitlines()[-1])
    assert [(place, code) for place, code in stopped if code != 3] == []
    assert last == [None, 0]
    assert done.stdout.count("stopped by a signal") == len(stopped) > 10
    assert (tmp_path / "pipeline/matches/report.html").exists()


def test_a_signal_to_one_rank_stops_all_in_the_middle_of_a_file(
    shard_set: Path, image_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "embedding"
    verb = ["embed", "--shards", shard_set, "--image", image_run, "--out", out, "--workers", 0,
            "--batch-size", 8, "--device", "cpu"]  # fmt: skip
    arguments = command(2, *verb)
    arguments[(at := arguments.index("dist_train")) : at + 1] = ["tests.faults.signalled_rank", "1"]
    done = subprocess.run(
        arguments, env=environment(), text=True, timeout=400, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert json.loads((out / "status.json").read_text())["status"] == "preempted"
    assert not list(out.glob("*.npy"))  # rank 0 left its unfinished file as well
    run(1, *verb)
    assert json.loads((out / "status.json").read_text())["status"] == "done"


def test_a_broken_tar_stops_all_ranks_and_is_named(
    image_options: list[object], shard_set: Path, tmp_path: Path
) -> None:  # fmt: skip
    shards = tmp_path / "shards"
    subprocess.run(["cp", "-r", str(shard_set), str(shards)], check=True)
    tar = shards / "train" / "000001.tar"
    data = bytearray(tar.read_bytes())
    data[600::7] = bytes(255 - value for value in data[600::7])
    tar.write_bytes(bytes(data))
    options = [shards if option == shard_set else option for option in image_options]
    process = start(2, "train", "image", *options, "--out", tmp_path / "run")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "000001.tar: slot" in output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed"


def test_killed_embedding_index_join_and_match_finish(
    shard_set: Path,
    image_run: Path,
    tmp_path: Path,
) -> None:
    names = ("embedding", "index", "pairs", "matches")
    embedding, index, pairs, matches = (tmp_path / name for name in names)
    steps = [
        (embedding, "image-00000.npy", ["embed", "--shards", shard_set, "--image", image_run,
                                        "--out", embedding, "--workers", 0]),
        (index, "shard-00000.faiss", ["index", embedding, "--out", index]),
        (pairs, "pairs/00000.parquet", ["join", embedding, "--index", index, "--out", pairs]),
        (matches, "stage.json", ["match", pairs, "--out", matches]),
    ]  # fmt: skip
    for folder, first, verb in steps:
        process = start(1, *verb)
        wait_for((folder / first).exists, process)
        kill(process)
        run(1, *verb)
        assert json.loads((folder / "status.json").read_text())["status"] == "done"
    undisturbed = tmp_path / "again"
    run(1, "join", embedding, "--index", index, "--out", tmp_path / "joined")
    run(1, "match", tmp_path / "joined", "--out", undisturbed)
    a, b = (pd.read_parquet(folder / "matches.parquet") for folder in (matches, undisturbed))
    assert a.posting_id.tolist() == b.posting_id.tolist()
    assert [list(m) for m in a.matches] == [list(m) for m in b.matches]
    assert np.isfinite(np.concatenate(list(a.scores))).all()
