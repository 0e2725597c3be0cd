"""What the tests share: tiny models that are built and saved here, a small generated catalogue."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from dist_train.synthetic.catalogue import generate
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from tests.support.launching import run

TINY_VIT = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "pretrained_cfg": {
        "input_size": [3, 32, 32], "fixed_input_size": True, "mean": [0.5] * 3, "std": [0.5] * 3,
        "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head",
    },
}  # fmt: skip

# A busy machine needs seconds for what takes milliseconds; no test is about time.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def _offline() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def _no_stop_requested() -> Iterator[None]:
    """A stop requested once holds for the process: no test may leave one behind."""
    yield
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a ViT of 32 x 32 pixels and D = 32, as timm saves one."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny-vit")
    (folder / "config.json").write_text(json.dumps(TINY_VIT))
    torch.manual_seed(0)
    model = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=0)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BERT of D = 32 over single characters, as transformers saves one."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=128,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a generated catalogue of 300 postings: catalogue.csv and images/."""
    folder = tmp_path_factory.mktemp("catalogue")
    generate(folder, 300)
    return folder


@pytest.fixture(scope="session")
def shard_set(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated catalogue as a shard set of small photos."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack(catalogue / "catalogue.csv", catalogue / "images", out, PackOptions(size=48))
    return out


@pytest.fixture(scope="session")
def image_options(tiny_vit: Path, shard_set: Path) -> list[object]:
    """A training of some steps in float32: the same options for every number of processes."""
    return [
        "--shards", shard_set, "--encoder.model", tiny_vit, "--encoder.image-size", 32,
        "--batch-size", 24, "--accumulation", 2, "--epochs", 0.8, "--lr", 1e-4,
        "--precision", "fp32", "--workers", 0, "--log-every", 1, "--checkpoint-every", 3,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def image_run(image_options: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training on one process, undisturbed."""
    out = tmp_path_factory.mktemp("image") / "run"
    run(1, "train", "image", *image_options, "--out", out)
    return out


@pytest.fixture(scope="session")
def text_run(tiny_bert: Path, shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training of the text encoder on two processes."""
    out = tmp_path_factory.mktemp("text") / "run"
    run(2, "train", "text", "--shards", shard_set, "--encoder.model", tiny_bert, "--out", out,
        "--batch-size", 16, "--epochs", 0.5, "--workers", 0, "--precision", "fp32")  # fmt: skip
    return out
