"""The model card where there is little to tell."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dist_train.config.training import ImageTraining
from dist_train.training.setup import Progress
from dist_train.training.validation import model_card


@dataclass
class Items:
    """As much of the training items as a card tells of."""

    config: Any = field(default_factory=lambda: ImageTraining(batch_size=12))
    numbers: np.ndarray = field(default_factory=lambda: np.arange(34))
    classes: int = 5
    steps: int = 78
    fingerprint: str = "0123456789abcdef" * 4


SCORES = {"f1": 0.5, "threshold": 0.25, "f1_self_match": 0.125, "items": 9.0}


def test_without_validation_products_it_says_so() -> None:
    card = model_card("image", Items(), {}, Progress(), 70)
    assert "There were no validation products" in card
    assert "the weights after step 70 of 78" in card
    assert "34 postings of 5 products" in card
    assert "`0123456789ab`" in card


def test_a_row_for_the_encoder_its_start_and_the_baseline() -> None:
    progress = Progress(start=SCORES | {"f1": 0.375, "recall_at_1": 0.75})
    card = model_card("text", Items(ImageTraining(ema=0.9)), SCORES, progress, 70)
    assert "the moving average of the weights after step 70" in card
    assert "| this encoder | 0.5000 | 0.2500 | – |" in card
    assert "before training | 0.3750 | 0.2500 | 0.7500 |" in card
    assert "only with itself | 0.1250 | – | – |" in card
    assert "On 9 validation postings" in card


def test_an_untrained_encoder_is_not_its_own_baseline() -> None:
    card = model_card("image", Items(), SCORES, Progress(start=SCORES), 0)
    assert "this encoder" in card
    assert "before training" not in card
