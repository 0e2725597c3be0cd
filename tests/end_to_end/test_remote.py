"""Stages on a shard set at a URL: the same results as from disk, and photos for the report."""

import json
from pathlib import Path

import numpy as np
import pytest

from dist_train.distributed.stage import parent_location
from dist_train.embedding.store import EmbeddingSet
from dist_train.matching.pairs import no_pairs
from dist_train.report.galleries import show_pairs
from shards.read import remote
from shards.read.shard_set import ShardSet
from shards.storage.errors import Unreachable
from tests.support.comparing import losses, weights
from tests.support.launching import run
from tests.support.serving import serve

pytestmark = pytest.mark.timeout(600)


def test_training_and_embedding_from_a_url_are_those_from_disk(
    shard_set: Path, image_options: list[object], image_run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("DIST_TRAIN_CACHE", str(tmp_path / "cache"))
    with serve(shard_set.parent) as server:
        url = f"{server.url}/{shard_set.name}"
        options = [url if word == shard_set else word for word in image_options]
        options[options.index("--workers") + 1] = 2
        run(1, "train", "image", *options, "--out", tmp_path / "run")
        assert losses(tmp_path / "run") == losses(image_run)
        ours, theirs = weights(tmp_path / "run"), weights(image_run)
        assert all(ours[name].equal(theirs[name]) for name in theirs)
        for shards, name in ((url, "there"), (shard_set, "here")):
            run(1, "embed", "--shards", shards, "--image", image_run, "--out", tmp_path / name,
                "--workers", 0)  # fmt: skip
        _check_embedding(tmp_path / "there", tmp_path / "here", url)
        data = {path: n for path, n in server.started.items() if not path.endswith(".json")}
        assert set(data.values()) == {1}
        monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
        server.broken = lambda path: "500"
        with pytest.raises(Unreachable, match=f"{url}/stage.json"):
            show_pairs([], no_pairs(), EmbeddingSet(tmp_path / "there"), url)


def _check_embedding(there: Path, here: Path, url: str) -> None:
    for part in sorted(here.glob("image-*.npy")):
        np.testing.assert_array_equal(np.load(there / part.name), np.load(part))
    parents = [json.loads((out / "stage.json").read_text())["parents"] for out in (there, here)]
    assert parents[0]["shards"]["path"] == url
    assert parents[0]["shards"]["fingerprint"] == parents[1]["shards"]["fingerprint"]
    assert parent_location(there, "shards", url) == url
    assert show_pairs([], no_pairs(), EmbeddingSet(there), url) == ([], None)
    _, reason = show_pairs([], no_pairs(), EmbeddingSet(there))
    assert f"opened only if you name it: --shards {url}" in str(reason)
    photos = ShardSet(url)
    shards = ShardSet(parent_location(here, "shards"))
    for posting_id in shards.packed.posting_id[:5]:
        assert photos.photo(posting_id) == shards.photo(posting_id)
