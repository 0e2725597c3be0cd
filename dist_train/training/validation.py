"""How good the encoder is on products it has not seen: F1 at the best threshold, by validation."""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from dist_train.config import TrainingOptions, View
from dist_train.embedding.vectors import plan_batches, unit_vectors
from dist_train.encoders.batches import load
from dist_train.encoders.folder import Encoder
from dist_train.evaluation.budget import pairs_per_item
from dist_train.evaluation.f1_curve import f1_curve
from dist_train.evaluation.leaks import twins
from dist_train.evaluation.metrics import recall_at_1
from dist_train.matching.join import Pairs, pairs_in_memory
from dist_train.matching.views import views_of_array
from dist_train.runtime import Runtime
from shards.reader import ItemReader, ShardSet

SCORES_AT_ONCE = 4 << 20
"""Of items that ask for their nearest one, in memory."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationItems:
    """Val-split items that have the part, by ascending number, with their label groups (n,)."""

    reader: ItemReader
    numbers: np.ndarray
    groups: np.ndarray

    def score(
        self, encoder: Encoder, config: TrainingOptions, runtime: Runtime
    ) -> dict[str, float] | None:
        """f1, its threshold, recall_at_1 and the floor, equal on all ranks; empty without items.

        None when a signal has asked for a stop meanwhile.
        """
        if not len(self.numbers):
            return {}
        training = encoder.training
        encoder.eval()
        vectors = self._vectors(encoder, config, runtime)
        encoder.train(training)
        if vectors is None:
            return None
        scores = self._score(vectors, runtime.device) if runtime.is_main else {}
        return runtime.tell_all(scores)

    def _score(self, vectors: np.ndarray, device: torch.device) -> dict[str, float]:
        budget = pairs_per_item(self.groups)
        pairs = pairs_in_memory(views_of_array(vectors), device, budget)
        curve = f1_curve(self.groups, pairs.i, pairs.j, pairs.score)
        threshold, f1 = curve.best()
        recall = recall_at_1(self.groups, nearest_items(vectors, pairs))
        scores = {"f1": f1, "threshold": float(threshold), "f1_itself_only": curve.base}
        # Where every item is alone in its group there is no recall, and JSON has no NaN.
        known = {} if math.isnan(recall) else {"recall_at_1": recall}
        return scores | known | {"items": len(vectors)}

    def _vectors(
        self, encoder: Encoder, config: TrainingOptions, runtime: Runtime
    ) -> np.ndarray | None:
        """Unit vectors (n, D) of all items; each rank computes its batches, each item once.

        All ranks look out for a signal after each round of batches; None when there was one.
        """
        out = np.zeros((len(self.numbers), encoder.width), np.float32)
        plans = plan_batches(self.reader, self.numbers, config.batch_size)
        batches = load(self.reader, encoder.inputs(), runtime.share(plans), config.workers)
        for _ in range(-(-len(plans) // runtime.world)):
            for items, unit in unit_vectors(encoder, batches, 1, runtime.device):
                out[np.searchsorted(self.numbers, items)] = unit
            if runtime.anyone_asked_to_stop():
                return None
        if runtime.world > 1:
            box = torch.from_numpy(out).to(runtime.device)
            dist.all_reduce(box)  # every row is zero on all ranks but one
            out = box.cpu().numpy()
        return out


def validation_items(shards: ShardSet, view: View) -> ValidationItems:
    """The val items of a shard set that have `view`.

    As in the final scores, those whose photo stands in another split are left out: an encoder that
    has learned a photo by heart would be called a good one.
    """
    table = shards.packed
    asked = (table.split == "val") & table[f"has_{view}"]
    known = twins(table).crosses_split
    if (asked & known).any():
        log.info("val: %d of %d items have a twin in another split and are left out of the scores",
                 (asked & known).sum(), asked.sum())  # fmt: skip
    val = table[asked & ~known]
    return ValidationItems(shards.reader(), val.index.to_numpy(), val.label_group.to_numpy(str))


def nearest_items(vectors: np.ndarray, pairs: Pairs) -> np.ndarray:
    """The nearest other item of each of N unit vectors (N, D): (N,) int64; alone, -1.

    Of items with a pair among the best-scored `pairs` it is in these; the others are compared with
    all, so many at a time that SCORES_AT_ONCE bounds what is held.
    """
    nearest = _nearest_in_pairs(pairs, len(vectors))
    left = np.flatnonzero(nearest < 0) if len(vectors) > 1 else np.zeros(0, np.int64)
    step = max(1, SCORES_AT_ONCE // max(1, len(vectors)))
    for start in range(0, len(left), step):
        rows = left[start : start + step]
        scores = vectors[rows] @ vectors.T
        scores[np.arange(len(rows)), rows] = -np.inf
        nearest[rows] = scores.argmax(1)
    return nearest


def _nearest_in_pairs(pairs: Pairs, items: int) -> np.ndarray:
    asking, other = np.concatenate([pairs.i, pairs.j]), np.concatenate([pairs.j, pairs.i])
    order = np.lexsort((other, -np.concatenate([pairs.score, pairs.score]), asking))
    found, first = np.unique(asking[order], return_index=True)
    nearest = np.full(items, -1, np.int64)
    nearest[found] = other[order][first]
    return nearest
