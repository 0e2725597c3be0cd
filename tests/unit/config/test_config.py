"""The options: checks, what of them a result depends on, where a model option points."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dist_train.config.options import Config, EmbedConfig, IndexConfig, JoinConfig, MatchConfig
from dist_train.config.training import (
    HeadOptions,
    ImageEncoderOptions,
    ImageTraining,
    TextEncoderOptions,
    TextTraining,
    result_options,
)
from dist_train.encoders.source import local_path
from shards.photos.options import PackOptions
from shards.storage.errors import BadInput

EVERY = (
    PackOptions, ImageEncoderOptions, TextEncoderOptions, HeadOptions, ImageTraining, TextTraining,
    EmbedConfig, IndexConfig, JoinConfig, MatchConfig,
)  # fmt: skip


# ── what a result depends on


def how_fields(options: Any) -> set[str]:
    return {field.name for field in fields(options) if field.metadata.get("how")}


@pytest.mark.parametrize("kind", EVERY)
def test_result_options_leave_out_how_and_keep_the_rest(kind: type) -> None:
    kept = result_options(kind())
    assert set(kept) == {field.name for field in fields(kind)} - how_fields(kind)
    assert json.loads(json.dumps(kept)) == kept


def test_what_only_says_how_is_marked() -> None:
    training = {"checkpoint_every", "keep", "validate_every", "log_every", "max_unreadable",
                "workers", "device", "gradient_checkpointing", "compile", "grace", "max_skipped",
                "compare_every"}  # fmt: skip
    assert how_fields(ImageTraining) == how_fields(TextTraining) == training
    assert how_fields(HeadOptions) == {"chunk"}
    embedding = {"max_unreadable", "workers", "device", "trust_remote_code"}
    assert how_fields(EmbedConfig) == embedding
    assert how_fields(PackOptions) == {"workers"}
    assert how_fields(JoinConfig) == {"memory", "audit_rows", "device"}
    assert how_fields(MatchConfig) == set()


def test_how_fields_are_left_out_of_nested_options_too() -> None:
    one = ImageTraining(head=HeadOptions(chunk=7), workers=0, device="cpu", keep=9)
    assert result_options(one) == result_options(ImageTraining())
    other = ImageTraining(head=HeadOptions(margin=0.1))
    assert result_options(other) != result_options(ImageTraining())
    assert result_options(other)["head"]["margin"] == 0.1


# ── checks


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (HeadOptions, {"scale": 65}, "head.scale: 65, at most 64"),
        (HeadOptions, {"scale": 0}, "scale: 0, must be above 0"),
        (HeadOptions, {"lr": -1.0}, "lr: -1.0, must be above 0"),
        (HeadOptions, {"lr": float("nan")}, "lr: nan, must be above 0"),
        (ImageTraining, {"batch_size": 0}, "batch_size: 0, must be above 0"),
        (ImageTraining, {"lr": 0.0}, "lr: 0.0, must be above 0"),
        (TextTraining, {"epochs": -1}, "epochs: -1, must lie in 0"),
        (TextTraining, {"workers": -1}, "workers: -1, must lie in 0"),
        (TextTraining, {"batch_size": 10, "accumulation": 4}, "batch_size 10 is no multiple of"),
        (EmbedConfig, {"batch_size": 0}, "batch_size: 0, must be above 0"),
        (IndexConfig, {"image_weight": 0}, "image_weight: 0, must lie between 0 and 1"),
        (IndexConfig, {"image_weight": 1.0}, "image_weight: 1.0, must lie between 0 and 1"),
        (JoinConfig, {"neighbours": -1}, "neighbours: -1, must lie in 0"),
        (JoinConfig, {"pairs_per_item": 0}, "pairs_per_item: 0, must be above 0"),
        (JoinConfig, {"max_score_floor": 1.5}, "max_score_floor: 1.5, must lie in -1 to 1"),
        (MatchConfig, {"threshold": 0.5, "threshold_from": Path("t")}, "give one of them"),
        (Config, {"catalogue": Path("c"), "out": Path("o"), "encoders": ()}, "encoders: name"),
        (EmbedConfig, {"workers": -1}, "workers"),
        (ImageTraining, {"min_crop": 0.0}, "min_crop"),
        (ImageTraining, {"min_crop": 1.5}, "min_crop"),
        (ImageTraining, {"warmup": 1.5}, "warmup"),
        (HeadOptions, {"ramp": -0.1}, "ramp"),
        (HeadOptions, {"margin": -0.5}, "margin"),
        (ImageTraining, {"clip": 0.0}, "clip"),
        (ImageTraining, {"seed": -1}, "seed: -1, must lie in 0 to 4294967295"),
        (TextTraining, {"seed": 2**32}, "seed: 4294967296, must lie in 0 to 4294967295"),
        (ImageEncoderOptions, {"image_size": 0}, "image_size"),
        (TextEncoderOptions, {"max_length": 0}, "max_length"),
        (TextEncoderOptions, {"dropout": 1.5}, "dropout"),
        (MatchConfig, {"threshold": float("nan")}, "threshold"),
        (MatchConfig, {"threshold": 0.5, "precision": 0.9}, "threshold and precision: give one"),
        (MatchConfig, {"threshold_from": Path("t"), "precision": 0.9}, "give one of them"),
        (MatchConfig, {"precision": 1.5}, "precision: 1.5, must lie in 0 to 1"),
        (MatchConfig, {"precision": float("nan")}, "precision"),
        (MatchConfig, {"candidates": 0}, "candidates: 0, must lie in 1"),
        (MatchConfig, {"max_group": 0}, "max_group: 0, must lie in 1"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(kind: type, options: dict, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        kind(**options)


def test_defaults_and_the_edges_of_what_is_allowed() -> None:
    for kind in EVERY:
        kind()
    HeadOptions(scale=64, margin=0.0, ramp=0.0)
    ImageTraining(epochs=0, workers=0, batch_size=12, accumulation=4, min_crop=1.0, warmup=0.0)
    for threshold in (0.0, -1.0):
        assert MatchConfig(threshold=threshold).threshold == threshold
        assert JoinConfig(max_score_floor=threshold).max_score_floor == threshold
    for precision in (0.0, 1.0):
        assert MatchConfig(precision=precision).precision == precision
    MatchConfig(candidates=1, max_group=1, features=(), plain=True)


# ── where a model option points


def test_local_path_expands_variables_and_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("WEIGHTS_HERE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("$WEIGHTS_HERE/model", "${WEIGHTS_HERE}/model", "~/model", f"{tmp_path}/model"):
        assert local_path(text) == tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    for text in ("model", "./model"):
        assert (local_path(text) or Path()).resolve() == tmp_path / "model"


def test_local_path_refuses_variables_that_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEIGHTS_NOWHERE", raising=False)
    for text in ("$WEIGHTS_NOWHERE/model", "${WEIGHTS_NOWHERE}"):
        with pytest.raises(BadInput, match="the variable is not set"):
            local_path(text)


def test_local_path_refuses_folders_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTS_HERE", str(tmp_path))
    for text in ("./none", "../none", f"{tmp_path}/none", "$WEIGHTS_HERE/none", "~/no such folder"):
        with pytest.raises(BadInput, match="no such folder"):
            local_path(text)


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "cahya/bert-base-indonesian-522M"])
def test_local_path_takes_anything_else_for_a_name_of_the_hub(name: str) -> None:
    assert local_path(name) is None
