"""What the tests of odd inputs share: a few photos, and encoders that were not trained."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.verbs import call


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twenty different photos, p0.jpg to p19.jpg, of 48 pixels."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(20):
        pixels = np.kron(random.integers(0, 256, (6, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"p{number}.jpg")
    return folder


@pytest.fixture(scope="session")
def encoders(
    photos: Path, tiny_vit: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs of both modalities whose encoders have random weights."""
    folder = tmp_path_factory.mktemp("encoders")
    rows = [f"i{n},p{n % 20}.jpg,thing {n % 20},g{n % 20}" for n in range(40)]
    text = "\n".join(["posting_id,image,title,label_group", *rows])
    (folder / "c.csv").write_text(text)
    words = ["pack", folder / "c.csv", "--images", photos, "--out", folder / "s", "--size", 32]
    assert call(*words).code == 0
    options = ["--shards", folder / "s", "--epochs", 0, "--batch-size", 8, "--workers", 0]
    models = {"image": [tiny_vit, "--encoder.image-size", 32], "text": [tiny_bert]}
    for modality, model in models.items():
        out = ["--out", folder / modality]
        done = call("train", modality, *options, *out, "--encoder.model", *model)
        assert done.code == 0, done.text
    return {modality: folder / modality for modality in models}
