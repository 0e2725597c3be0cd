"""Fails a run whose encoder stands still although its learning rate is above 0."""

import torch
from torch import nn

from dist_train.training.setup import Training
from shards.storage.errors import Failed

NOTICEABLE = 0.01
"""Share of the option lr from which on some weight moves in every step: at the end of a schedule
the rate may be too small for float32."""


class StandstillGuard:
    """Watches the encoder's weights and gradients in the steps of one attempt at a run.

    Whatever keeps them still (a setting of the launcher, a pass of items that are all alike), the
    head would go on learning, the loss would fall, and the encoder would be exported as it came.
    """

    def __init__(self, training: Training) -> None:
        self.training, self.updates = training, training.progress.updates
        self.before, self.rate, self.norm = checksum(training.encoder.backbone), 0.0, 0.0

    def note(self, values: dict[str, float]) -> None:
        """Note the rate and the gradient's norm of a step that has been taken."""
        if self.training.progress.updates > self.updates:  # it was not left out
            self.updates = self.training.progress.updates
            self.rate = max(self.rate, values["lr"])
            self.norm = max(self.norm, values["grad_norm"])

    def check(self, taken: int) -> None:
        """Raise Failed if nothing has moved since the last check; all ranks call it together."""
        if self.rate <= NOTICEABLE * self.training.items.config.lr:
            return
        now = checksum(self.training.encoder.backbone)
        moved = self.training.runtime.all_reduce_sum(float(now != self.before))
        if not moved or self.norm == 0:
            cause = (
                "its gradient is 0 (are the items of a pass all alike?)"
                if self.norm == 0
                else "no weight changes (look for a setting of the launcher that holds its rate "
                "down, or raise --lr)"
            )
            raise Failed(
                f"after step {taken} the encoder stands still although its learning rate was "
                f"{self.rate:.1e}: {cause}"
            )
        self.before, self.rate, self.norm = now, 0.0, 0.0


def checksum(encoder: nn.Module) -> int:
    """A 64-bit sum that a change of any one bit of any weight (under ZeRO-3: ours) changes."""
    total = torch.zeros((), dtype=torch.int64)
    for parameter in encoder.parameters():
        values = getattr(parameter, "ds_tensor", parameter).detach()
        bits = values.view(getattr(torch, f"int{8 * values.element_size()}"))
        # An odd factor loses no bit of what was summed before; everything wraps at 64 bits.
        total = total.to(bits.device) * 1_000_003 + bits.sum(dtype=torch.int64)
    return int(total)
