"""The demo: a generated catalogue through every stage, small enough for a laptop."""

import os
from pathlib import Path

from dist_train.config.options import Config, EmbedConfig
from dist_train.config.training import (
    HeadOptions,
    ImageEncoderOptions,
    ImageTraining,
    TextEncoderOptions,
    TextTraining,
)
from dist_train.synthetic.catalogue import generate
from shards.photos.options import PackOptions
from shards.storage.errors import BadInput

WEIGHTS = "DIST_TRAIN_WEIGHTS"


def demo_config(out: Path, items: int) -> Config:
    """Generate the catalogue below `out`; the config that takes it through all stages.

    The weights lie in the folder that DIST_TRAIN_WEIGHTS names; launch/demo.sh sets it.
    """
    if WEIGHTS not in os.environ:
        raise BadInput(f"{WEIGHTS} names no folder of weights; start the demo by launch/demo.sh")
    workers = min(os.cpu_count() or 1, 8)
    generate(out / "catalogue", items, workers=workers)
    return Config(
        catalogue=out / "catalogue" / "catalogue.csv",
        images=out / "catalogue" / "images",
        out=out,
        compare=("untrained",),
        pack=PackOptions(size=192, workers=workers),
        image=ImageTraining(
            epochs=3, batch_size=32, lr=4e-4, workers=1, head=HeadOptions(margin=0.3),
            encoder=ImageEncoderOptions(model=f"${WEIGHTS}/mobilenetv2_100", image_size=112),
            validate_every=0,
        ),
        text=TextTraining(
            epochs=3, batch_size=32, lr=1e-4, workers=0, head=HeadOptions(margin=0.3),
            encoder=TextEncoderOptions(model=f"${WEIGHTS}/all-minilm-l6-v2", max_length=32),
            validate_every=0,
        ),
        embed=EmbedConfig(workers=1),
    )  # fmt: skip
