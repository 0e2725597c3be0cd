"""Model folders as people have them: read as they are meant, or refused before the training."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.verbs import Said, call

WEIGHTS = "model.safetensors"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write the weights of a folder again after a change of the tensors by name."""
    tensors = load_file(folder / WEIGHTS)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, folder / WEIGHTS,
              metadata={"format": "pt"})  # fmt: skip


def without(part: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(
        folder, lambda tensors: {name: t for name, t in tensors.items() if part not in name}
    )


def prefixed(folder: Path) -> None:
    rewrite(folder, lambda tensors: {f"net.model.{name}": t for name, t in tensors.items()})


def holding_nan(folder: Path) -> None:
    rewrite(folder, lambda tensors: [tensor.fill_(torch.nan) for tensor in tensors.values()])


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])


def pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")


def keep(*names: str) -> Callable[[Path], None]:
    """Remove all other files."""

    def change(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()

    return change


def config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


# What is wrong, and a fact beside the folder that the refusal must name.
BOTH: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (keep(), "nothing|empty|config.json"),
    "only its config": (keep("config.json"), WEIGHTS),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "a config that is no JSON": (config("{"), "config.json|JSON"),
    "a config that is a list": (config("[]"), "config.json"),
    "a config of something else": (config('{"name": "x"}'), "config.json"),
    "weights cut off": (cut, WEIGHTS),
    "a pointer of Git LFS": (pointer, "LFS|" + WEIGHTS),
    "weights under a prefix": (prefixed, "weights|tensors"),
    "weights of NaN": (holding_nan, "NaN"),
}
TEXT = BOTH | {
    "no tokenizer": (keep("config.json", WEIGHTS), "tokenizer"),
    "a layer is missing": (without("layer.1."), r"layer\.1"),
}
IMAGE = BOTH | {"a block is missing": (without("blocks.1."), r"blocks\.1")}


@pytest.fixture
def train(shard_set: Path, tmp_path: Path) -> Callable[..., Said]:
    """Start a training with a model; 0 epochs export it as it is."""

    def start(modality: str, model: object, epochs: float = 0) -> Said:
        size = ["--encoder.image-size", 32] if modality == "image" else []
        return call(
            "train", modality, "--shards", shard_set, "--encoder.model", model, *size, "--epochs",
            epochs, "--batch-size", 16, "--workers", 0, "--out", tmp_path / "run",
        )  # fmt: skip

    return start


def refused(said: Said, model: object, fact: str, out: Path) -> None:
    """In one line that names the model and the fact, and before anything was exported."""
    assert said.code == 2, said.text
    last = said.text.strip().splitlines()[-1]
    assert last.startswith("dist-train: ")
    assert str(model) in last
    assert re.search(fact, last), last
    assert not (out / "encoder").exists()


@pytest.mark.parametrize(
    ("modality", "kind"), [*(("text", k) for k in TEXT), *(("image", k) for k in IMAGE)]
)
def test_a_folder_that_is_no_model(
    modality: str, kind: str, train: Callable[..., Said], tiny_bert: Path, tiny_vit: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    source, table = (tiny_bert, TEXT) if modality == "text" else (tiny_vit, IMAGE)
    shutil.copytree(source, tmp_path / "model")
    change, fact = table[kind]
    change(tmp_path / "model")
    refused(train(modality, tmp_path / "model"), tmp_path / "model", fact, tmp_path / "run")


@pytest.mark.parametrize("modality", ["text", "image"])
def test_what_is_no_folder(modality: str, train: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    for model, fact in (
        (tmp_path / "weights.bin", "file|folder"),
        (tmp_path / "none", "folder"),
        ("$NOT_SET/model", "NOT_SET"),
    ):
        refused(train(modality, model), model, fact, tmp_path / "run")


@pytest.mark.parametrize("modality", ["text", "image"])
def test_the_model_of_the_other_modality(
    modality: str, train: Callable[..., Said], tiny_bert: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    model = tiny_vit if modality == "text" else tiny_bert
    refused(train(modality, model), model, "timm|transformers|text|image", tmp_path / "run")


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_run_is_a_model(
    modality: str, train: Callable[..., Said], encoders: dict[str, Path], tmp_path: Path
) -> None:
    """The folder of an earlier training goes on where it ended."""
    said = train(modality, encoders[modality])
    assert said.code == 0, said.text
    weights = [
        load_file(run / "encoder" / WEIGHTS) for run in (tmp_path / "run", encoders[modality])
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_titles_beyond_the_positions(
    tiny_bert: Path, train: Callable[..., Said], tmp_path: Path
) -> None:
    """More tokens than the model has positions for: the number that fits is named."""
    shutil.copytree(tiny_bert, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 16}))
    rewrite(
        tmp_path / "model",
        lambda tensors: {
            name: t[:16].clone() if "position_embeddings" in name else t
            for name, t in tensors.items()
        },
    )
    said = train("text", tmp_path / "model")
    refused(said, tmp_path / "model", "16", tmp_path / "run")
