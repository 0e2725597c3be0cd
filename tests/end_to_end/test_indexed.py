"""The pipeline from tars of another program: PNG, WebP and JPEG photos, titles, labels, no JSON."""

import io
from pathlib import Path

import pandas as pd
import pytest
import webdataset as wds
from PIL import Image

from shards.read.shard_set import ShardSet
from tests.support.launching import run

pytestmark = pytest.mark.timeout(600)
KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@pytest.fixture(scope="module")
def tars(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 postings in three tars, one for each kind of photo, as webdataset writes them."""
    folder = tmp_path_factory.mktemp("theirs")
    table = pd.read_csv(catalogue / "catalogue.csv", dtype=str).head(120)
    for number, (suffix, kind) in enumerate(KINDS.items()):
        with wds.TarWriter(str(folder / f"{suffix}.tar")) as tar:
            for row in table.iloc[number::3].itertuples():
                out = io.BytesIO()
                with Image.open(catalogue / "images" / row.image) as opened:
                    opened.resize((64, 64)).save(out, kind)
                facts = {suffix: out.getvalue(), "txt": row.title, "cls": row.label_group}
                tar.write({"__key__": row.posting_id} | facts)
    return folder


def test_they_are_indexed_trained_embedded_and_matched(
    tars: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    output = run(1, "index-tars", tars, "--workers", 2)
    assert "120 items in 3 tars indexed, 0 rejected, 0 with a remark" in output
    run(
        1, "train", "image", "--shards", tars, "--encoder.model", tiny_vit,
        "--encoder.image-size", 32, "--batch-size", 8, "--epochs", 0.5, "--precision", "fp32",
        "--workers", 0, "--out", tmp_path / "image",
    )  # fmt: skip
    run(1, "embed", "--shards", tars, "--image", tmp_path / "image", "--out", tmp_path / "emb",
        "--workers", 0)  # fmt: skip
    items = pd.read_parquet(tmp_path / "emb" / "items.parquet")
    packed = ShardSet(tars).items
    same = ["posting_id", "title", "label_group", "split"]
    assert items[same].equals(packed[same])
    assert items.has_image.all()
    run(1, "index", tmp_path / "emb", "--out", tmp_path / "index")
    run(1, "join", tmp_path / "emb", "--index", tmp_path / "index", "--out", tmp_path / "pairs")
    run(1, "match", tmp_path / "pairs", "--out", tmp_path / "matches")
    matches = pd.read_parquet(tmp_path / "matches" / "matches.parquet")
    assert sorted(matches.posting_id) == sorted(packed.posting_id)
    run(1, "report", tmp_path / "matches")
    assert "data:image" in (tmp_path / "matches" / "report.html").read_text()
