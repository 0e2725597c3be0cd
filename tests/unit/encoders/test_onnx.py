"""An exported encoder without our code: as ONNX, and opened by plain timm and transformers.

Tiny encoders on the generated catalogue; in the full run MobileNetV2 on photos of groceries and
MiniLM on offers' titles.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_train import cli
from dist_train.config.training import (
    ImageEncoderOptions,
    ImageTraining,
    Modality,
    TextEncoderOptions,
    TextTraining,
)
from dist_train.encoders.encoder import load_encoder
from dist_train.encoders.onnx import export_onnx
from dist_train.training.loop import train
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import Item, ShardSet
from shards.storage.errors import BadInput

ITEMS = 40
needs_real = [
    pytest.mark.full,
    pytest.mark.skipif("DIST_TRAIN_WEIGHTS" not in os.environ, reason="no DIST_TRAIN_WEIGHTS"),
    pytest.mark.skipif("DIST_TRAIN_DATA" not in os.environ, reason="no DIST_TRAIN_DATA"),
]


@dataclass(frozen=True)
class Exported:
    """A finished run and the shards that it was trained on."""

    modality: Modality
    run: Path
    shards: Path

    @property
    def folder(self) -> Path:
        return self.run / "encoder"

    def items(self) -> list[Item]:
        """Some items that have the part, titles of many lengths among them."""
        here = np.flatnonzero(ShardSet(self.shards).packed[f"has_{self.modality}"])
        reader = ShardSet(self.shards).reader()
        return [reader[int(n)] for n in here[np.linspace(0, len(here) - 1, ITEMS).astype(int)]]

    def vectors(self, items: list[Item]) -> tuple[tuple[torch.Tensor, ...], np.ndarray]:
        """What our encoder takes and gives: its inputs, and unit vectors (b, D)."""
        encoder = load_encoder(self.folder, self.modality)
        inputs = encoder.inputs()(items, [0] * len(items))
        with torch.inference_mode():
            return inputs, torch.nn.functional.normalize(encoder(*inputs), dim=1).numpy()


CASES = [
    pytest.param(
        (modality, size), id=f"{size} {modality}", marks=needs_real if size == "real" else ()
    )
    for size in ("tiny", "real")
    for modality in ("image", "text")
]


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    modality, size = request.param
    if size == "tiny":
        run = request.getfixturevalue(f"{modality}_run")
        return Exported(modality, run, request.getfixturevalue("shard_set"))
    torch.set_num_threads(1)
    return {"image": trained_on_photos, "text": trained_on_titles}[modality](
        tmp_path_factory.mktemp(modality)
    )


COMMON = {"batch_size": 16, "workers": 0, "device": "cpu", "validate_every": 0, "lr": 1e-4}
"""Few steps: the weights have left where they began, the neck has statistics."""


def trained_on_photos(folder: Path) -> Exported:
    grocery = Path(os.environ["DIST_TRAIN_DATA"]) / "grocery"
    table = pd.read_csv(grocery / "catalogue.csv", dtype=str).iloc[::20]
    table.to_csv(folder / "few.csv", index=False)
    pack(folder / "few.csv", grocery / "images", folder / "s", PackOptions(size=150, workers=1))
    model = "$DIST_TRAIN_WEIGHTS/mobilenetv2_100"
    encoder = ImageEncoderOptions(model=model, image_size=128)
    train("image", folder / "s", folder / "r", ImageTraining(encoder=encoder, epochs=0.5, **COMMON))
    return Exported("image", folder / "r", folder / "s")


def trained_on_titles(folder: Path) -> Exported:
    offers = Path(os.environ["DIST_TRAIN_DATA"]) / "offers" / "abt_buy.csv"
    pd.read_csv(offers, dtype=str).iloc[:300].to_csv(folder / "few.csv", index=False)
    pack(folder / "few.csv", None, folder / "s", PackOptions(workers=1))
    model = "$DIST_TRAIN_WEIGHTS/all-minilm-l6-v2"
    encoder = TextEncoderOptions(model=model, max_length=48)
    train("text", folder / "s", folder / "r", TextTraining(encoder=encoder, epochs=0.5, **COMMON))
    return Exported("text", folder / "r", folder / "s")


def least_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of unit rows (b, D)."""
    assert ours.shape == theirs.shape
    return float((ours.astype(np.float64) * theirs).sum(1).min())


def test_onnx_gives_the_same_vectors(
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "dist-train",
        "export",
        str(exported.run),
        "--onnx",
        str(tmp_path / "encoder.onnx"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    cli.main()
    assert f"{tmp_path / 'encoder.onnx'}: written" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx"))
    items = exported.items()
    for batch in (items[:1], items[1:]):  # another size, and titles of other lengths
        inputs, ours = exported.vectors(batch)
        names = [one.name for one in session.get_inputs()]
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        (theirs,) = session.run(None, feed)
        print(
            f"{exported.modality}: least cosine of ONNX to torch {least_cosine(ours, theirs):.7f}"
        )
        assert least_cosine(ours, theirs) >= 0.9999


PLAIN = """
import json, sys
import torch
from safetensors.torch import load_file, save_file

folder, modality, given, out = sys.argv[1:]
settings = json.load(open(folder + "/preprocessing.json"))
pooling = json.load(open(folder + "/dist_train.json"))["options"]["pooling"]
with torch.inference_mode():
    if modality == "image":
        import timm
        model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
        found = model(load_file(given)["pixels"])
    else:
        from transformers import AutoModel, AutoTokenizer
        tokens = AutoTokenizer.from_pretrained(folder)(
            json.load(open(given)), truncation=True, max_length=settings["max_length"],
            padding=True, return_tensors="pt",
        )
        states = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].float()
        found = states[:, 0] if pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
    neck = load_file(folder + "/neck.safetensors")
    found = (found - neck["mean"]) * (neck["variance"] + 1e-5).rsqrt() * neck["weight"]
    save_file({"vectors": torch.nn.functional.normalize(found)}, out)
ours = {name for name in sys.modules if name.split(".")[0] in ("dist_train", "shards")}
assert not ours, ours
"""
"""What somebody who has timm or transformers and no line of ours writes."""


def test_plain_libraries_give_the_same_vectors(exported: Exported, tmp_path: Path) -> None:
    items = exported.items()
    inputs, ours = exported.vectors(items)
    if exported.modality == "image":
        save_file({"pixels": inputs[0].contiguous()}, tmp_path / "given")
    else:
        (tmp_path / "given").write_text(json.dumps([item.title for item in items]))
    arguments = [exported.folder, exported.modality, tmp_path / "given", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, *map(str, arguments)], cwd=tmp_path, text=True,
        timeout=280, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    theirs = load_file(tmp_path / "out")["vectors"].numpy()
    print(f"{exported.modality}: least cosine of plain libraries {least_cosine(ours, theirs):.7f}")
    assert least_cosine(ours, theirs) >= 0.99999


def test_the_card_names_data_recipe_scores_and_baselines(exported: Exported) -> None:
    card = (exported.folder / "README.md").read_text()
    stage = json.loads((exported.run / "stage.json").read_text())
    counts = json.loads((exported.run / "manifest.json").read_text())["counts"]
    assert f"{counts['items']} postings of {counts['classes']} products" in card
    assert stage["parents"]["shards"]["fingerprint"][:12] in card
    for option in ("batch_size", "lr", "epochs", "seed"):
        assert f"| {option} | {stage['config'][option]} |" in card
    assert f"| head.margin | {stage['config']['head']['margin']} |" in card
    scores = counts["val"]
    assert f"{scores['items']:.0f} validation postings" in card
    for score in (scores["f1"], scores["f1_self_match"]):
        assert f"{score:.4f}" in card
    assert "baseline: each posting matched only with itself" in card
    assert "baseline: the encoder before training" in card
    assert {"config.json", "model.safetensors"} <= {path.name for path in exported.folder.iterdir()}


def test_without_the_packages_it_says_what_to_install(image_run, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(BadInput, match=r"onnxscript.*pip install"):
        export_onnx(image_run, tmp_path / "encoder.onnx")
    assert not (tmp_path / "encoder.onnx").exists()
