"""Scores of a validation against all pairs, and which items it asks."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch

from dist_train.config.training import ImageEncoderOptions, ImageTraining
from dist_train.decisions.score import Comparison
from dist_train.distributed.runtime import Runtime
from dist_train.encoders.encoder import new_encoder
from dist_train.evaluation.f1_curve import (
    LEAST_PAIRS_PER_ITEM,
    MOST_PAIRS,
    f1_curve,
    pairs_per_item,
)
from dist_train.evaluation.labelled import near_duplicates_across_splits
from dist_train.evaluation.metrics import recall_at_1
from dist_train.matching.vectors import vectors_of_array
from dist_train.training import validation
from dist_train.training.validation import ValidationItems, nearest_items, score_vectors
from shards.pack.pack import pack
from shards.photos.options import PackOptions
from shards.read.shard_set import ShardSet

CPU = torch.device("cpu")
CASES = {
    "four of 500": ([500] * 4, [0.8] * 4),
    "two of 600, many pairs": ([600] * 2 + [2] * 200, [0.3] * 2 + [1.0] * 200),
    "fourteen of 65": ([65] * 14, [0.9] * 14),
    "six of 300": ([300] * 6, [0.9] * 6),
}


def products(sizes: list[int], spread: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Groups (N,) and unit vectors (N, 32), each about the middle of its group."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(len(sizes)), sizes).astype(str)
    middles = rng.normal(size=(len(sizes), 32))
    middles /= np.linalg.norm(middles, axis=1, keepdims=True)
    away = rng.normal(size=(len(groups), 32)) * np.repeat(spread, sizes)[:, None] / 32**0.5
    vectors = np.repeat(middles, sizes, axis=0) + away
    return groups, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@dataclass
class Exact:
    """What all pairs say."""

    f1: float
    recall: float


def exact(groups: np.ndarray, vectors: np.ndarray) -> Exact:
    scores = vectors @ vectors.T
    i, j = np.triu_indices(len(vectors), 1)
    f1 = f1_curve(groups, i, j, scores[i, j]).best()[1]
    np.fill_diagonal(scores, -9)
    return Exact(f1, recall_at_1(groups, scores.argmax(1)))


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_all_pairs_however_large_the_products(case):
    groups, vectors = products(*CASES[case])
    got = score_vectors(groups, vectors, CPU)
    wanted = exact(groups, vectors)
    assert got["f1"] == pytest.approx(wanted.f1, abs=1e-4)
    assert got["recall_at_1"] == pytest.approx(wanted.recall, abs=1e-12)


def test_a_comparison_finds_all_true_pairs_of_large_products():
    groups, vectors = products([300] * 6, [0.9] * 6)
    split = np.where(np.isin(groups, ["0", "1", "2"]), "val", "test")
    items = pd.DataFrame({"split": split, "label_group": groups, "photo_group": -1})
    comparison = Comparison(items)
    for part in ("val", "test"):
        few = vectors[comparison.rows[part]]
        pairs = comparison.pairs(vectors_of_array(few))
        found = f1_curve(comparison.groups[part], *pairs).best()[1]
        assert found == pytest.approx(exact(comparison.groups[part], few).f1, abs=1e-4)


def test_the_budget_is_twice_the_true_pairs_and_bounded(caplog):
    assert pairs_per_item(np.array([], str)) == LEAST_PAIRS_PER_ITEM
    assert pairs_per_item(np.arange(1000) // 5) == LEAST_PAIRS_PER_ITEM
    assert pairs_per_item(np.arange(1000) // 500) == 499  # 2 x 500 x 499 / 2 true pairs
    assert not caplog.text
    assert pairs_per_item(np.zeros(100_000, int)) == MOST_PAIRS / 100_000
    assert "only the best 200 pairs an item are scored" in caplog.text


@pytest.mark.parametrize("at_once", [1, 700, 1 << 20])
def test_nearest_items_are_those_of_all_whoever_has_a_pair(monkeypatch, at_once):
    monkeypatch.setattr(validation, "SCORES_AT_ONCE", at_once)
    _, vectors = products([4] * 30, [0.9] * 30)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -9)
    i, j = np.nonzero(np.triu(scores > 0.55))
    pairs = validation.Pairs(i, j, scores[i, j])
    assert 0 < len(np.union1d(i, j)) < len(vectors)
    np.testing.assert_array_equal(nearest_items(vectors, pairs), scores.argmax(1))
    nothing = validation.Pairs(i[:0], j[:0], scores[i, j][:0])
    assert nearest_items(vectors[:1], nothing).tolist() == [-1]


def test_items_with_a_near_duplicate_in_another_split_are_not_scored(
    catalogue, shard_set, tmp_path, caplog
):
    table = pd.read_csv(catalogue / "catalogue.csv", dtype=str)
    packed = ShardSet(shard_set).packed.set_index("posting_id")
    photos = table.set_index("posting_id").image
    learned = packed.index[(packed.split == "train") & packed.has_image]
    val_items = packed.index[(packed.split == "val") & packed.has_image]
    for one, other in zip(val_items[::2], learned, strict=False):
        table.loc[table.posting_id == one, "image"] = photos[other]
    table.to_csv(tmp_path / "copies.csv", index=False)
    pack(tmp_path / "copies.csv", catalogue / "images", tmp_path / "s", PackOptions(size=48))
    shards = ShardSet(tmp_path / "s")
    crossing = near_duplicates_across_splits(shards.packed)
    for modality in ("image", "text"):
        val = shards.packed[(shards.packed.split == "val") & shards.packed[f"has_{modality}"]]
        with caplog.at_level("INFO", "dist_train"):
            items = ValidationItems(shards, modality)
        assert crossing[val.index].sum() >= len(val_items) // 2
        assert items.numbers.tolist() == val.index[~crossing[val.index]].tolist()
        assert f"of {len(val)} items have a near-duplicate in another split" in caplog.text


@pytest.mark.parametrize("training", [True, False])
def test_a_validation_leaves_the_encoder_in_the_mode_that_it_was_in(shard_set, tiny_vit, training):
    """That which learns in training, the average of its weights in evaluation."""
    config = ImageTraining(workers=0, precision="fp32")
    encoder = new_encoder(ImageEncoderOptions(model=str(tiny_vit), image_size=32), 0)
    seen, modules = [], list(encoder.train(training).modules())
    encoder.register_forward_hook(lambda *_: seen.append({one.training for one in modules}))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    items = ValidationItems(ShardSet(shard_set), "image")
    scores = items.score(encoder, config, Runtime("cpu"))
    assert scores["items"] == len(items.numbers)
    assert seen == [{False}] * len(seen)
    assert {one.training for one in modules} == {training}
    after = encoder.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_where_nobody_has_a_partner_there_is_no_recall_and_no_better_threshold():
    groups, vectors = products([1] * 6, [0.5] * 6)
    got = score_vectors(groups, vectors, CPU)
    assert "recall_at_1" not in got
    assert (got["f1"], got["f1_self_match"], got["items"]) == (1.0, 1.0, 6)
    assert got["threshold"] > (vectors @ vectors.T)[np.triu_indices(6, 1)].max() - 1e-6
