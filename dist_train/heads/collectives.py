"""What the ranks of a sharded head tell each other; alone, nothing is sent."""

from typing import Any

import torch
import torch.distributed as dist

LABEL_BASE = 1 << 20
# Their names since torch 2.14, which warns at every call of the older ones.
_every_part: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_sum_of_part: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world() -> int:
    """W; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (b, D) and int64 labels (b,) of all ranks, (B, D) and (B,), in one collective."""
    if world() == 1:
        return rows, labels
    # A label as two numbers that float32 holds exactly; -1 comes back as -1.
    high, low = labels // LABEL_BASE, labels % LABEL_BASE
    packed = torch.cat([rows, torch.stack([high, low], 1).to(rows.dtype)], 1)
    out = packed.new_empty(world() * len(packed), packed.shape[1])
    _every_part(out, packed)
    high, low = out[:, -2:].to(torch.int64).unbind(1)
    return out[:, :-2].contiguous(), high * LABEL_BASE + low


def sum_in_place(values: torch.Tensor) -> None:
    """Sum over ranks."""
    if world() > 1:
        dist.all_reduce(values)


def scatter_sum(rows: torch.Tensor) -> torch.Tensor:
    """This rank's part (B / W, D) of the sum over ranks of `rows` (B, D)."""
    if world() == 1:
        return rows
    out = rows.new_empty(len(rows) // world(), rows.shape[1])
    _sum_of_part(out, rows.contiguous())
    return out
