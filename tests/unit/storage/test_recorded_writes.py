"""What every stage writes is on the disk before it has its name: the rule, on a real record."""

from pathlib import Path

import pytest

from dist_train.config.options import EmbedConfig, IndexConfig, JoinConfig, MatchConfig
from dist_train.config.training import ImageEncoderOptions, ImageTraining
from dist_train.decisions.match import match
from dist_train.embedding.embed import embed
from dist_train.matching.build_pairs import build_pairs
from dist_train.matching.index import build_index
from dist_train.synthetic.catalogue import generate
from dist_train.training.loop import train
from shards.pack.index_tars import index_tars
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet
from shards.storage.files import sync
from tests.support.recorded_writes import Event, faults, recorded
from tests.support.serving import Serving
from tests.support.tars import samples, write_tar

LOGS = ("metrics.jsonl", "tensorboard/*")
"""Of a run: they grow by a line at a time."""


@pytest.fixture(scope="module")
def stages(
    catalogue: Path, tiny_vit: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[Event]]]:
    """Every stage that writes a folder, run once: the folder and the record."""
    folder = tmp_path_factory.mktemp("stages")
    lines = (catalogue / "catalogue.csv").read_text().splitlines(keepends=True)
    (folder / "c.csv").write_text("".join(lines[:121]))
    training = ImageTraining(
        encoder=ImageEncoderOptions(model=str(tiny_vit), image_size=32), epochs=1, batch_size=16,
        checkpoint_every=2, workers=0, device="cpu", precision="fp32",
    )  # fmt: skip
    how = {"workers": 0, "device": "cpu", "precision": "fp32"}
    write_tar(folder / "index-tars" / "0.tar", samples(0, 4))
    out = {name: folder / name for name in (
        "generate", "pack", "index-tars", "train", "embed", "index", "join", "match",
    )}  # fmt: skip
    calls = {
        "generate": lambda: generate(out["generate"], 3),
        "pack": lambda: pack(folder / "c.csv", catalogue / "images", out["pack"],
                             PackOptions(size=32, shard_items=30)),
        "index-tars": lambda: index_tars(out["index-tars"]),
        "train": lambda: train("image", out["pack"], out["train"], training),
        "embed": lambda: embed(out["pack"], out["embed"], EmbedConfig(**how), out["train"], None),
        "index": lambda: build_index(out["embed"], out["index"], IndexConfig()),
        "join": lambda: build_pairs(out["embed"], out["index"], out["join"],
                                    JoinConfig(device="cpu")),
        "match": lambda: match(out["join"], out["match"], MatchConfig()),
    }  # fmt: skip
    found = {}
    for name, call in calls.items():
        with recorded() as events:
            call()
        found[name] = out[name], events
    return found


WRITTEN = {
    "generate": ["catalogue.csv", "images/00000"],
    "pack": ["train/000000.tar", "train/000000.idx", "items.parquet", "manifest.json"],
    "index-tars": ["0.idx", "items.parquet", "manifest.json"],
    "train": ["checkpoints/step-*", "encoder/model.safetensors", "manifest.json"],
    "embed": ["image-00000.npy", "items.parquet", "manifest.json"],
    "index": ["shard-00000.faiss", "index.json", "manifest.json"],
    "join": ["pairs/00000.parquet", "nearest.parquet", "proof.json", "manifest.json"],
    "match": ["matches.parquet", "groups.parquet", "threshold.json", "manifest.json"],
}
"""Some of what each stage is about: that these were recorded proves that the recorder saw it."""


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_stage_writes_is_on_the_disk_before_it_has_its_name(stages, name: str) -> None:
    out, events = stages[name]
    renamed = [event.path.relative_to(out) for event in events if event.renamed]
    for pattern in WRITTEN[name]:
        assert any(path.match(pattern) for path in renamed), (pattern, renamed)
    logs = (*LOGS, "0.tar") if name == "index-tars" else LOGS
    assert faults(events, out, logs) == []


def test_a_copy_of_a_remote_file_is_on_the_disk_before_it_has_its_name(
    server: Serving, cache: Path
) -> None:
    with recorded() as events:
        reader = ShardSet(f"{server.url}/a").reader(["test"])
        assert reader[0].posting_id
    assert {".tar", ".idx"} == {path.suffix for path in map(Path, server.started)} - {".json"}
    assert len([event for event in events if event.renamed]) >= 2
    assert faults(events, cache, logs=("*.lock",)) == []


def test_what_cannot_be_waiting_for_the_disk_is_no_error() -> None:
    sync(Path("/proc/version"))  # fsync says EINVAL of it, as on some read-only media
