"""How far a training has come, beside its weights: counts, scores, and the best encoder so far."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch


@dataclass
class Progress:
    """Equal on all ranks, but for `best_weights`, which rank 0 holds."""

    updates: int = 0
    """Steps of the encoder's optimizer: all steps but the skipped ones."""
    skipped: int = 0
    """Steps left out because a loss or gradient was no number."""
    skipped_in_a_row: int = 0
    validated: int = -1
    """Step of the last validation."""
    scores: dict[str, float] = field(default_factory=dict)
    """Of the last validation."""
    start: dict[str, float] = field(default_factory=dict)
    """Scores of the encoder before its first step."""
    best_step: int = 0
    """Step of the best validation of a trained encoder; 0: there was none."""
    best: dict[str, float] = field(default_factory=dict)
    """Its scores."""
    without_better: int = 0
    """Validations in a row since then."""
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """The encoder at `best_step`, on the CPU of rank 0, where it is to be kept."""

    def validation(self, step: int, scores: dict[str, float]) -> bool:
        """Take in a validation; whether a trained encoder was never better."""
        self.validated, self.scores = step, scores
        if step == 0:
            self.start = scores
        if step == 0 or not scores:
            return False
        if self.best and scores["f1"] <= self.best["f1"]:
            self.without_better += 1
            return False
        self.best_step, self.best, self.without_better = step, scores, 0
        return True

    def to_json(self) -> dict[str, Any]:
        """All but the weights."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "best_weights"}

    def take(self, saved: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        """Become what `to_json` told of and `weights` hold."""
        for name, value in (saved | {"best_weights": weights}).items():
            setattr(self, name, value)
