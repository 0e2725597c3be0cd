"""Position to item by arithmetic: a keyed permutation per epoch, one integer of state.

Position p counts every item since the first step. Epoch e = p div N, place i = p mod N, and the
item is permutation(seed, e)(i): each item exactly once an epoch, the tail of an epoch carried into
the next batch. Any rank can compute any batch of any step without the steps before it.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np

from shards.order.permutation import keys_of_each, permuted, round_keys
from shards.storage.errors import BadInput

FORMAT = 1
Mode = dict[str, str | int]
"""Name and parameters of an order (JSON): all that it depends on beside its seed."""


@dataclass
class Order:
    """The order of N items under a seed: any item may follow any other."""

    name: ClassVar[str] = "global"
    items: int
    seed: int

    @property
    def positions(self) -> int:
        """Positions of an epoch."""
        return self.items

    @property
    def mode(self) -> Mode:
        """Name and parameters of this order."""
        parameters = asdict(self)
        del parameters["seed"]
        return {"order": self.name} | parameters

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Item numbers (int64, 0 to N-1) at `positions` (int64, 0 and up, any shape)."""
        positions = np.asarray(positions, np.int64)
        epochs, places = np.divmod(positions.ravel(), self.positions)
        items = np.empty_like(places)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            items[in_epoch] = self.numbers(places[in_epoch], int(epoch))
        return items.reshape(positions.shape)

    def numbers(self, places: np.ndarray, epoch: int) -> np.ndarray:
        """Item numbers (n,) at `places` (n,), 0 to `positions` - 1, of one epoch."""
        return permuted(places, self.items, round_keys(self.seed, epoch))


@dataclass
class WindowOrder(Order):
    """For storage with slow seeks: items are shuffled within windows of a few small regions.

    Chunks of C consecutive items are permuted and laid into windows of about K chunks (three
    quarters to one and a half of it); then the items of a window are permuted. So reads stay
    inside one window's regions of C items. The first chunk begins at another item in each epoch.
    """

    name: ClassVar[str] = "window"
    # Larger chunks make batches less diverse: of 2,000 shards 64 x 512 reads 0.80 times as many
    # as random batches would.
    chunk: int = 16
    chunks: int = 2048

    def numbers(self, places: np.ndarray, epoch: int) -> np.ndarray:
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


@dataclass
class StoredOrder(Order):
    """No shuffling: the items in stored order."""

    name: ClassVar[str] = "none"
    seed: int = 0

    def numbers(self, places: np.ndarray, epoch: int) -> np.ndarray:
        return places


@dataclass(frozen=True, kw_only=True)
class OrderState:
    """The data, the order and the position in it; under 1 kB as JSON for data of any size.

    `fingerprint` is the shard set's, `batch` the items per step and `position` the items that
    completed steps have used: those only read ahead are not counted.
    """

    fingerprint: str
    seed: int
    mode: Mode
    batch: int
    position: int = 0

    def at(self, position: int) -> "OrderState":
        """The same order at another position."""
        return replace(self, position=position)

    def to_json(self) -> dict[str, Any]:
        """The state as a JSON value."""
        return {"format": FORMAT} | asdict(self)

    def check_goes_on(self, saved: dict[str, Any], where: str) -> int:
        """The position of a saved state (JSON) of the same order, be it of another batch.

        Raises BadInput naming `where` and what differs: resuming would repeat and lose items.
        """
        ours = self.to_json()
        for name in ("format", "fingerprint", "seed", "mode"):
            if saved.get(name) != ours[name]:
                raise BadInput(
                    f"{where}: stands in another order: {name} {saved.get(name)} there, "
                    f"{ours[name]} now; go on with the same shards and options, or start a new run"
                )
        return int(saved["position"])


def check_equal(states: list[dict[str, Any]]) -> None:
    """Raise BadInput when the states of the ranks (in rank order) differ, naming rank and value."""
    for rank, state in enumerate(states):
        for name in states[0] | state:
            if state.get(name) != states[0].get(name):
                raise BadInput(
                    f"rank {rank} would train in another order than rank 0: {name} "
                    f"{state.get(name)} there, {states[0].get(name)} on rank 0; give all "
                    "processes the same shards, options and checkpoints"
                )
