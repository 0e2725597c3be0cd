"""The position of a training in its order: one small JSON, equal on every process."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from shards.order.global_order import Mode
from shards.storage.errors import BadInput

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class OrderState:
    """The data, the order and the position in it; under 1 kB as JSON for data of any size.

    `fingerprint` is the shard set's, `mode` the order's (all its parameters), `batch` the items
    per step and `position` the items that completed steps have used. Items that were only read
    ahead are not counted.
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
        """The position of a saved state (JSON) of the same order.

        Another batch is allowed where the order does not depend on it. Raises BadInput naming
        `where` and what differs: resuming in another order would repeat and lose items.
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
