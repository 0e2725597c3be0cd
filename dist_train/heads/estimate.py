"""What a head will take on one rank, by formula, before anything is allocated."""

from dataclasses import dataclass

from dist_train.heads.row_optimizer import BLOCK
from shards.files import format_bytes


@dataclass(frozen=True, kw_only=True)
class HeadEstimate:
    """Bytes of one rank, float32: C classes, K centres each of width D, W ranks, B items a pass."""

    classes: int
    width: int
    batch: int
    world: int
    centres: int = 1
    sample: float = 1.0
    chunk: int = 8_192
    passes: int = 1
    """Of a step; they add up their gradients."""

    @property
    def rows(self) -> int:
        """Centres of the rank that has most."""
        return -(-self.classes // self.world) * self.centres

    @property
    def seen(self) -> int:
        """Centres that a pass sees, with sampling in expectation: others by chance, own always."""
        if self.sample == 1:
            return self.rows
        # The batch's classes spread over ranks; those drawn anyway are not counted twice.
        classes = self.rows / self.centres
        own = classes * (1 - (1 - 1 / self.classes) ** self.batch)
        return round((own + (classes - own) * self.sample) * self.centres)

    @property
    def weights(self) -> int:
        """The centres."""
        return self.rows * self.width * 4

    @property
    def gradient(self) -> int:
        """That of the seen centres; of several passes the most while one is added.

        A dense one and the one that is added; of sparse ones also their list, and from the third
        pass on its sum (measured: 4 and 5 times one).
        """
        if self.passes == 1:
            return self._one_gradient()
        times = 2 if self.sample == 1 else 4 if self.passes == 2 else 5
        return times * self._one_gradient()

    def _one_gradient(self) -> int:
        numbers = 0 if self.sample == 1 else self.seen * 8
        return self.seen * self.width * 4 + numbers

    @property
    def moments(self) -> int:
        """Both of AdamW, and a count of steps for each centre."""
        return 2 * self.weights + self.rows * 4

    @property
    def buffers(self) -> int:
        """The most that lives at one time beside these, in a pass or in the optimizer's step."""
        return max(self._pass_buffers(), self._step_buffers())

    def _pass_buffers(self) -> int:
        chunk = min(self.chunk, self.seen)
        logits, rows = chunk * self.batch * 4, chunk * self.width * 4
        # Of each class the nearest centre's value (4) and number (8).
        nearest = chunk // self.centres * self.batch * 12 if self.centres > 1 else 0
        # Rows of all items, and of an even share of them: this rank's, or of its classes.
        items, own = self.batch * self.width * 4, self.batch * self.width * 4 // self.world
        # Unit centres and lengths; embeddings, what normalisation keeps of them (3); all items as
        # they came (alone these are the same) and scaled.
        held = logits + rows + self.seen * 4 + 4 * own + items * (1 if self.world == 1 else 2)
        # Own items and centres while these are normalised; there is no gradient yet.
        forward = (1 + 3 * self.centres) * own - self._one_gradient()
        # Weighted by the softmax, and their gradient; own, own centres. Then in a chunk the
        # nearest centres, or the product that tells what lies along; at the end what own ones get.
        backward = 2 * items + 2 * own + max(nearest, rows, 2 * own)
        return held + max(forward, backward)

    def _step_buffers(self) -> int:
        block = min(BLOCK, self.seen) * self.width * 4
        if self.sample == 1:
            return block
        # A sparse gradient is put in order, which takes another and three lists of numbers.
        return max(4 * block, self._one_gradient() + 3 * 8 * self.seen)

    @property
    def flops(self) -> int:
        """Operations of a pass: of its product, once more of the same, and of both gradients."""
        return 8 * self.batch * self.seen * self.width

    @property
    def communication(self) -> int:
        """Bytes that a step's collectives carry, as the size of each one's whole tensor.

        A pass: B x (D + 2) numbers gathered, 2 B doubles summed, B x D numbers reduced and
        scattered; a step: one number, the norm. A ring moves (W - 1) / W of it past each rank.
        """
        if self.world == 1:
            return 0
        one = self.batch * (self.width + 2) * 4 + 16 * self.batch + self.batch * self.width * 4
        return self.passes * one + 8

    @property
    def collectives(self) -> int:
        """Calls a step."""
        return 0 if self.world == 1 else 3 * self.passes + 1

    @property
    def total(self) -> int:
        """Bytes of memory at the peak."""
        held = self.weights + self.moments
        if self.sample == 1 or self.passes == 1:
            return held + self.gradient + self.buffers
        # Sparse gradients are added up between two passes, when no buffer is in use.
        return held + max(self.gradient, 2 * self._one_gradient() + self.buffers)

    def __str__(self) -> str:
        parts = ("weights", "gradient", "moments", "buffers", "total")
        told = ", ".join(f"{name} {format_bytes(getattr(self, name))}" for name in parts)
        return (
            f"head: {self.classes} classes, {self.rows} centres x {self.width} a rank: {told}; "
            f"{self.collectives} collectives a step carry {format_bytes(self.communication)}"
        )
