"""What a launcher may not ask of a training: refused in one line, before anything is built."""

import json
from pathlib import Path

import pytest

from dist_train.config.training import ImageTraining
from dist_train.training.accelerator import check_deepspeed, check_launcher
from shards.storage.errors import BadInput
from tests.support.launching import ROOT
from tests.support.short_training import image_config, new_training

ZERO = {"zero_optimization": {"stage": 2}}
AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@pytest.fixture
def deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sets a launcher's DeepSpeed JSON."""

    def set_json(settings: object) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
        return path

    return set_json


def only_line(error: pytest.ExceptionInfo[BadInput]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}},
         ["scheduler", "--schedule"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.001}}}, ["optimizer", "--lr"]),
        ({"train_batch_size": 64}, ["train_batch_size", "--batch-size"]),
        ({"train_micro_batch_size_per_gpu": 32}, ["train_micro_batch_size_per_gpu"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps", "--accumulation"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "--clip"]),
        ({"train_batch_size": 64, "scheduler": {}}, ["train_batch_size", "scheduler"]),
        ({"fp16": {"enabled": True}}, ["fp16", "--precision"]),
        ({"bf16": {"enabled": True}}, ["bf16", "--precision bf16"]),
        ({"bfloat16": {"enabled": True}}, ["bfloat16", "--precision bf16"]),
        ({"amp": {"enabled": True}}, ["amp"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast"]),
        ({"activation_checkpointing": {}}, ["--gradient-checkpointing"]),
        ({"compile": {"deepcompile": True}}, ["--compile"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op"]),
        ({"gradient_predivide_factor": 2.0}, ["gradient_predivide_factor"]),
        ({"communication_data_type": "fp16"}, ["communication_data_type"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["data_types"]),
        ({"progressive_layer_drop": {"enabled": True}}, ["progressive_layer_drop"]),
        ({"compression_training": {"weight_quantization": {}}}, ["compression_training"]),
        ({"zero_optimization": {"stage": 0}}, ["stage is 0"]),
        ({"zero_optimization": {"stage": 4}}, ["stage is 4"]),
        ({"zero_optimization": {}}, ["stage is 0"]),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
         ["zero_optimization.reduce_bucket_size auto"]),
        ({"zero_optimization": None}, ["no zero_optimization"]),
    ],
)  # fmt: skip
def test_keys_that_dist_train_owns_are_refused(deepspeed, settings, words) -> None:
    path = deepspeed(ZERO | settings)
    with pytest.raises(BadInput) as error:
        check_deepspeed(ImageTraining())
    line = only_line(error)
    assert all(word in line for word in words), line
    assert str(path) in line or "stage" in line


@pytest.mark.parametrize(
    "settings",
    [
        ZERO, ZERO | AUTO,
        ZERO | {"fp16": {"enabled": "auto"}, "bf16": {"enabled": False}, "steps_per_print": 10},
        {"zero_optimization": {"stage": 3, "overlap_comm": True,
                               "stage3_gather_16bit_weights_on_model_save": "auto"}},
    ],
)  # fmt: skip
def test_other_keys_are_left_to_deepspeed(deepspeed, settings) -> None:
    deepspeed(settings)
    check_deepspeed(ImageTraining())


def test_the_shipped_files_are_accepted(monkeypatch) -> None:
    files = sorted((ROOT / "launch/accelerate").glob("*.json"))
    assert len(files) == 3
    for path in files:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
        check_deepspeed(ImageTraining())


def test_a_file_that_is_missing_or_no_json_is_named(deepspeed, monkeypatch, tmp_path) -> None:
    path = deepspeed("{")
    with pytest.raises(BadInput, match=path.name):
        check_deepspeed(ImageTraining())
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "none.json"))
    with pytest.raises(BadInput, match=r"none\.json: DeepSpeed's JSON is not there"):
        check_deepspeed(ImageTraining())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--accumulation for 2"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "--clip for 5.0"),
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0", "stage is 0"),
    ],
)
def test_fields_of_accelerate_that_differ_are_refused(monkeypatch, name, value, words) -> None:
    config = ImageTraining(accumulation=2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "5.0")
    check_deepspeed(config)
    monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=words):
        check_deepspeed(config)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP, which dist_train does not do"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "asks for fp16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "asks for fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--compile"),
    ],
)
def test_what_no_training_here_does_is_refused(
    monkeypatch, shard_set, tiny_vit, name, value, words
) -> None:
    for harmless in ("false", "no", "NO", "bf16"):
        monkeypatch.setenv(name, harmless if name.startswith("ACCELERATE_USE") else "no")
        check_launcher()
    monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=words) as error:
        new_training(shard_set, image_config(tiny_vit))
    only_line(error)
