"""When the encoder is validated, what becomes of its scores, and when training has seen enough."""

import logging
from pathlib import Path

from dist_train.encoders.folder import Encoder
from dist_train.monitor.metrics import Metrics, scores_at
from dist_train.runtime import Runtime
from dist_train.training.data import TrainingItems
from dist_train.training.setup import Training
from dist_train.training.validation import ValidationItems

log = logging.getLogger(__name__)


class Judge:
    """Of one life of a run; all ranks call it alike and come to the same conclusions."""

    def __init__(
        self, training: Training, items: TrainingItems, validation: ValidationItems, out: Path,
        runtime: Runtime, metrics: Metrics | None,
    ) -> None:  # fmt: skip
        self.training, self.items, self.validation = training, items, validation
        self.out, self.runtime, self.metrics = out, runtime, metrics
        self.config = items.config

    def is_due(self, step: int) -> bool:
        """Whether the encoder after `step` steps is to be validated and has not been."""
        every = self.config.validate_every * self.items.epoch_steps
        due = step == self.items.steps or (every > 0 and step // every > (step - 1) // every)
        return due and self.training.progress.validated < step

    def look(self, step: int) -> bool:
        """Score the encoder of `step` and keep the best; whether no signal came in between."""
        judged = self.training.judged_encoder()
        scores = self._scores(step, judged)
        if scores is None:
            return False
        better = self.training.progress.validation(step, scores)
        if better and self.config.keep_best and self.runtime.is_main:
            state = judged.state_dict()
            self.training.progress.best_weights = {k: v.cpu().clone() for k, v in state.items()}
        return True

    def has_seen_enough(self) -> bool:
        """So many validations in a row were no better that training ends before its last step."""
        return 0 < self.config.patience <= self.training.progress.without_better

    def _scores(self, step: int, judged: Encoder) -> dict[str, float] | None:
        known = scores_at(self.out, step) if self.runtime.is_main else {}
        if known := self.runtime.tell_all(known):
            return known  # of a life that was cut off after its last checkpoint
        scores = self.validation.score(judged, self.config, self.runtime)
        if scores:
            told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            log.info("step %d: val %s", step, told)
            if self.metrics is not None:
                self.metrics.write(step, "val", scores)
        return scores
