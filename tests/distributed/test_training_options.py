"""With every option on, the same training on one and on two processes, under DDP and ZeRO."""

from pathlib import Path

import pytest

from dist_train.training.loop import train
from tests.support.comparing import largest_difference, losses
from tests.support.launching import CPU, run
from tests.support.short_training import EVERY_OPTION, IMAGE_OPTIONS, image_config, text_config

pytestmark = pytest.mark.timeout(600)
OPTIONS = {"lr": 1e-4, "validate_every": 0, "checkpoint_every": 3, "epochs": 0.6}


def words_of(config, model: Path) -> list[object]:
    """The options that differ from their defaults."""
    arguments = [
        "--encoder.model", model, "--batch-size", config.batch_size, "--epochs", config.epochs,
        "--lr", config.lr, "--precision", "fp32", "--workers", 0, "--log-every", 1,
        "--checkpoint-every", 3, "--validate-every", 0, "--ema", config.ema, "--layer-decay",
        config.layer_decay, "--freeze", config.freeze, "--schedule", config.schedule, "--warmup",
        config.warmup, "--head.warmup", config.head.warmup, "--head.lr", config.head.lr,
        "--gradient-checkpointing", "--compare-every", 2,
    ]  # fmt: skip
    if hasattr(config, "erase"):
        more = ["--erase", config.erase, "--rand-augment", config.rand_augment, "--jitter",
                config.jitter, "--mixup", config.mixup, "--cutmix", config.cutmix]  # fmt: skip
        return [*arguments, *more, "--encoder.image-size", 32]
    return [*arguments, "--encoder.max-length", config.encoder.max_length]


@pytest.mark.parametrize(
    ("modality", "launcher"),
    [
        ("text", CPU),
        *(
            pytest.param(modality, launcher, marks=pytest.mark.full)
            for modality, launcher in [
                ("image", CPU), *(("text", f"deepspeed_zero{stage}.yaml") for stage in (1, 2, 3)),
                ("image", "deepspeed_zero2.yaml"), ("image", "deepspeed_zero3.yaml"),
            ]
        ),
    ],
)  # fmt: skip
def test_options_do_not_depend_on_the_processes(
    modality: str, launcher: str, shard_set: Path, tiny_vit: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    if modality == "image":
        config, model = image_config(tiny_vit, **EVERY_OPTION | IMAGE_OPTIONS | OPTIONS), tiny_vit
    else:
        config, model = text_config(tiny_bert, **EVERY_OPTION | OPTIONS), tiny_bert
    train(modality, shard_set, tmp_path / "one", config)
    out = tmp_path / "two"
    verb = ["train", modality, "--shards", shard_set, "--out", out, *words_of(config, model)]
    run(2, *verb, launcher=launcher, timeout=500)
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    difference = largest_difference(out, tmp_path / "one")
    print(f"{modality} {launcher}: {difference:.1e}")
    assert difference < 1e-5
