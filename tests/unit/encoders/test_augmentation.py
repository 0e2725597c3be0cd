"""Augmentations that options may ask for: every one that passes the check can be had."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.pictures import encoded
from dist_train.config.training import ImageTraining
from dist_train.encoders.batches import ImageInputs
from shards.read.shard_set import Item
from shards.storage.errors import BadInput

FORMS = [
    "rand", "rand-m9-mstd0.5-inc1", "rand-m10-inc1", "rand-m7-n3-p1.0", "rand-m15-mmax20-inc1",
    "rand-mstd200", "rand-t3a-m10", "rand-t3aw", "rand-tweights", "rand-p0.3-inc0",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_passes_the_check_makes_photos(form):
    config = ImageTraining(rand_augment=form)
    inputs = ImageInputs(32, [0.5] * 3, [0.5] * 3, augmentation=config)
    colours = np.random.default_rng(0).integers(0, 256, (40, 44, 3), np.uint8)
    photo = encoded(Image.fromarray(colours), 90)
    items = [Item(f"p{n}", photo, "", -1) for n in range(200)]
    (pixels,) = inputs(items, list(range(200)))  # so many that each transform comes up
    assert pixels.shape == (200, 3, 32, 32)
    assert torch.isfinite(pixels).all()
    assert not torch.equal(pixels[0], pixels[1])


@pytest.mark.parametrize(
    "form",
    ["rand-m99x-q1", "rand-zz", "rand-", "rand-m", "rand-q1", "random", "rand-tzz", "rand-mstdinf",
     "rand-n0", "rand-p.5", "rand-inc2", "original", "rand-m7,n2"],
)  # fmt: skip
def test_what_timm_would_stop_at_or_pass_over_is_refused(form):
    with pytest.raises(BadInput, match=f"^rand_augment: {form}, must be rand and any of -m7"):
        ImageTraining(rand_augment=form)
