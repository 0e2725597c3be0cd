"""A catalogue without labels: encoders are exported as they are, and embed its items."""

import json
from pathlib import Path

import pytest

from dist_train.config.options import EmbedConfig
from dist_train.config.training import HeadOptions
from dist_train.embedding.embed import embed
from dist_train.training.loop import train
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.storage.errors import BadInput
from tests.support.short_training import image_config, text_config

EMBED = EmbedConfig(workers=0, device="cpu", precision="fp32")


def packed(folder: Path, rows: list[str]) -> Path:
    """A shard set of titles."""
    (folder / "c.csv").write_text("\n".join(["posting_id,image,title,label_group", *rows]))
    pack(folder / "c.csv", None, folder / "s", PackOptions())
    return folder / "s"


@pytest.mark.parametrize(
    "rows",
    [
        ["a,,red shoe,", "b,,blue lamp,"],
        ["a,,red shoe,0", "b,,red shoes,0", "c,,lamp,"],  # one product to train on
        ["a,,red shoe,1", "b,,red shoes,1"],  # none, but one to test on
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"photos_per_product": 2, "head": HeadOptions(margin_of_largest=0.1)}]
)
def test_an_untrained_encoder_needs_no_labels(tmp_path, tiny_bert, rows, options) -> None:
    shards, run = packed(tmp_path, rows), tmp_path / "r"
    train("text", shards, run, text_config(tiny_bert, epochs=0, **options))
    assert json.loads((run / "manifest.json").read_text())["counts"]["steps"] == 0
    assert embed(shards, tmp_path / "e", EMBED, None, run)["items"] == len(rows)
    train("text", shards, run, text_config(tiny_bert, epochs=0, **options))  # is done already


def test_a_training_still_needs_two_products(tmp_path, tiny_bert) -> None:
    shards = packed(tmp_path, ["a,,red shoe,", "b,,blue lamp,"])
    with pytest.raises(BadInput, match=r"0 label groups to train on.*--epochs 0 needs none"):
        train("text", shards, tmp_path / "r", text_config(tiny_bert))


def test_an_encoder_of_what_no_item_has_is_exported_and_not_embedded(tmp_path, tiny_vit) -> None:
    shards = packed(tmp_path, ["a,,red shoe,", "b,,blue lamp,"])
    train("image", shards, tmp_path / "r", image_config(tiny_vit, epochs=0))
    with pytest.raises(BadInput, match="no item has a photo; leave out --image"):
        embed(shards, tmp_path / "e", EMBED, tmp_path / "r", None)
