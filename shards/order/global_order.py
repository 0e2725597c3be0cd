"""Position to item by arithmetic: a keyed permutation per epoch, one integer of state.

Position p counts every item since the first step. Epoch e = p div N, place i = p mod N, and the
item is permutation(seed, e)(i): each item exactly once an epoch, the tail of an epoch carried into
the next batch. Any rank can compute any batch of any step without the steps before it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shards.order.permutation import keys_of_each, permuted, round_keys

Mode = dict[str, str | int]
"""Name and parameters of an order (JSON): all that it depends on beside seed and items."""


@dataclass(frozen=True)
class Order:
    """The order of N items under a seed: any item may follow any other."""

    items: int
    seed: int

    @property
    def positions(self) -> int:
        """Positions of an epoch."""
        return self.items

    @property
    def mode(self) -> Mode:
        """Name and parameters of this order."""
        return {"order": "global", "items": self.items}

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Item numbers (int64, 0 to N-1) at `positions` (int64, 0 and up, any shape)."""
        return by_epoch(positions, self.positions, self._of_epoch)

    def _of_epoch(self, places: np.ndarray, epoch: int) -> np.ndarray:
        return permuted(places, self.items, round_keys(self.seed, epoch))


@dataclass(frozen=True)
class WindowOrder(Order):
    """For storage with slow seeks: items are shuffled within windows of a few small regions.

    Chunks of C consecutive items are permuted and laid into windows of about K chunks (three
    quarters to one and a half of it); then the items of a window are permuted. So reads stay
    inside one window's regions of C items. The first chunk begins at another item in each epoch.
    """

    # Larger chunks make batches less diverse: of 2,000 shards 64 x 512 reads 0.80 times as many
    # as random batches would.
    chunk: int = 16
    chunks: int = 2048

    @property
    def mode(self) -> Mode:
        """Name and parameters of this order."""
        sizes = {"chunk": self.chunk, "chunks": self.chunks}
        return {"order": "window", "items": self.items} | sizes

    def _of_epoch(self, places: np.ndarray, epoch: int) -> np.ndarray:
        chunks = -(-self.items // self.chunk)
        windows = max(1, (2 * chunks + self.chunks) // (2 * self.chunks))
        # Window w holds the chunks from w x chunks / windows (rounded down) to the next one's.
        window = ((places // self.chunk + 1) * windows - 1) // chunks
        first = window * chunks // windows * self.chunk
        last = np.minimum((window + 1) * chunks // windows * self.chunk, self.items)
        window_keys = keys_of_each(round_keys(self.seed, epoch, "windows"), window)
        place = first + permuted(places - first, last - first, window_keys)
        chunk, offset = np.divmod(place, self.chunk)
        keys = round_keys(self.seed, epoch, "chunks")
        # The short chunk stays last, so that every other place is chunk x C + offset.
        full_chunks = self.items // self.chunk
        is_full = chunk < full_chunks
        chunk[is_full] = permuted(chunk[is_full], full_chunks, keys)
        return (chunk * self.chunk + offset + int(keys[0, 0]) % self.items) % self.items


@dataclass(frozen=True)
class StoredOrder(Order):
    """No shuffling: the items in stored order."""

    seed: int = 0

    @property
    def mode(self) -> Mode:
        """Name and parameters of this order."""
        return {"order": "none", "items": self.items}

    def _of_epoch(self, places: np.ndarray, epoch: int) -> np.ndarray:
        return places


def by_epoch(
    positions: np.ndarray, length: int, item_at: Callable[[np.ndarray, int], np.ndarray]
) -> np.ndarray:
    """Items (int64) at `positions` of any shape, in epochs of `length` positions.

    `item_at(places, epoch)` gives the items at places 0 to length - 1 of one epoch.
    """
    positions = np.asarray(positions, np.int64)
    epochs, places = np.divmod(positions.ravel(), length)
    out = np.empty_like(places)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        out[in_epoch] = item_at(places[in_epoch], int(epoch))
    return out.reshape(positions.shape)
