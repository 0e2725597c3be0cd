"""The memory and traffic of a head on one rank, by formula, before anything is allocated."""

from dataclasses import dataclass

from dist_train.heads.centres import ROW_BLOCK
from shards.storage.files import format_bytes


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
    """Passes a step, whose gradients are added up."""

    @property
    def rows(self) -> int:
        """Centres of the rank that has most."""
        return -(-self.classes // self.world) * self.centres

    @property
    def seen(self) -> int:
        """Centres that a pass sees: all, or in expectation those of its items and of a sample."""
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
    def gradient_of_pass(self) -> int:
        """Gradient of the centres that one pass sees, and their row numbers if it is sparse."""
        numbers = 0 if self.sample == 1 else self.seen * 8
        return self.seen * self.width * 4 + numbers

    @property
    def gradient(self) -> int:
        """The most that gradients take, while that of one pass is added to that of the others.

        Dense ones are two: the sum and the one that is added. Sparse ones are also concatenated,
        and from the third pass on summed (measured: 4 and 5 times one).
        """
        if self.passes == 1:
            return self.gradient_of_pass
        times = 2 if self.sample == 1 else 4 if self.passes == 2 else 5
        return times * self.gradient_of_pass

    @property
    def moments(self) -> int:
        """Both of AdamW's moments, and a count of steps for each centre."""
        return 2 * self.weights + self.rows * 4

    @property
    def buffers(self) -> int:
        """The most that is held at one time beside these, in a pass or in the optimizer's step."""
        chunk = min(self.chunk, self.seen)
        logits, rows = chunk * self.batch * 4, chunk * self.width * 4
        # For each class the nearest centre's value (4) and number (8).
        nearest = chunk // self.centres * self.batch * 12 if self.centres > 1 else 0
        # Rows of all items, and of an even share of them: this rank's, or of its classes.
        items, own = self.batch * self.width * 4, self.batch * self.width * 4 // self.world
        # Unit centres and lengths; embeddings, what normalisation keeps of them (3); all items as
        # they came (with one rank these are the same) and scaled.
        held = logits + rows + self.seen * 4 + 4 * own + items * (1 if self.world == 1 else 2)
        # The centres of own items while these are normalised; there is no gradient yet.
        forward = 3 * self.centres * own - self.gradient_of_pass
        # Weighted by the softmax, and their gradient; own, own centres. Then in a chunk the
        # nearest centres, or the product for the component along the centre; at the end the
        # gradient of own items.
        backward = 2 * items + 2 * own + max(nearest, rows, 2 * own)
        step = min(ROW_BLOCK, self.seen) * self.width * 4
        if self.sample < 1:
            # A sparse gradient is sorted, which takes another and three lists of numbers.
            step = max(4 * step, self.gradient_of_pass + 3 * 8 * self.seen)
        return max(held + max(forward, backward), step)

    @property
    def flops(self) -> int:
        """Operations of a pass: of its product, once more of the same, and of both gradients."""
        return 8 * self.batch * self.seen * self.width

    @property
    def traffic(self) -> tuple[int, int]:
        """Collectives of a step, and the bytes they carry: the size of each one's complete tensor.

        A pass: B x (D + 2) numbers gathered, 2 B doubles summed, B x D numbers reduced and
        scattered; a step: one number, the norm. A ring moves (W - 1) / W of it past each rank.
        """
        if self.world == 1:
            return 0, 0
        one = self.batch * (self.width + 2) * 4 + 16 * self.batch + self.batch * self.width * 4
        return 3 * self.passes + 1, self.passes * one + 8

    @property
    def total(self) -> int:
        """Bytes of memory at the peak."""
        held = self.weights + self.moments
        if self.sample == 1 or self.passes == 1:
            return held + self.gradient + self.buffers
        # Sparse gradients are added up between two passes, when no buffer is in use.
        return held + max(self.gradient, 2 * self.gradient_of_pass + self.buffers)

    def __str__(self) -> str:
        names = ("weights", "gradient", "moments", "buffers", "total")
        collectives, size = self.traffic
        memory = ", ".join(f"{name} {format_bytes(getattr(self, name))}" for name in names)
        return (
            f"head: {self.classes} classes, {self.rows} centres x {self.width} a rank: {memory}; "
            f"{collectives} collectives a step carry {format_bytes(size)}"
        )
