"""The ONNX file of an encoder gives the vectors that torch gives, on real items, for any batch."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from dist_train.config import View
from dist_train.encoders.folder import load_encoder
from dist_train.encoders.onnx import export_onnx
from shards.errors import BadInput
from shards.reader import ShardSet


@pytest.mark.parametrize("view", ["image", "text"])
def test_onnx_gives_the_same_vectors(
    view: View, image_run: Path, text_run: Path, shard_set: Path, tmp_path: Path
) -> None:  # fmt: skip
    run = {"image": image_run, "text": text_run}[view]
    file = tmp_path / "encoder.onnx"
    export_onnx(run, file)
    session = onnxruntime.InferenceSession(str(file))
    encoder = load_encoder(run / "encoder", view)
    reader, packed = ShardSet(shard_set).reader(), ShardSet(shard_set).packed
    numbers = np.flatnonzero(packed[f"has_{view}"])
    for batch in (numbers[:1], numbers[1:40]):  # another size, and titles of other lengths
        inputs = encoder.inputs()([reader[int(n)] for n in batch], [0] * len(batch))
        with torch.inference_mode():
            ours = torch.nn.functional.normalize(encoder(*inputs), dim=1).numpy()
        names = [one.name for one in session.get_inputs()]
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        (theirs,) = session.run(None, feed)
        assert theirs.shape == ours.shape
        assert (ours * theirs).sum(1).min() >= 0.9999


def test_without_the_packages_it_says_what_to_install(image_run, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(BadInput, match=r"onnxscript.*pip install"):
        export_onnx(image_run, tmp_path / "encoder.onnx")
    assert not (tmp_path / "encoder.onnx").exists()
