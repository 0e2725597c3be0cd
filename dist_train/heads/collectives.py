"""What the ranks of a sharded head tell each other; alone, nothing is sent."""

from typing import Any

import torch
import torch.distributed as dist

LABEL_BITS = 40
"""Of a label, and its sign."""
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
    packed = torch.cat([rows, _digits(labels, rows.dtype)], 1)
    out = packed.new_empty(world() * len(packed), packed.shape[1])
    _every_part(out, packed)
    width = rows.shape[1]
    return out[:, :width].contiguous(), _labels(out[:, width:])


def _bits(dtype: torch.dtype) -> int:
    """Of a digit: float32 holds whole numbers of 24 exactly, bfloat16 of 8."""
    return 20 if dtype.itemsize >= 4 else 8


def _digits(labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Labels (b,) as numbers that `dtype` holds exactly, (b, digits), the highest with the sign.

    Two of float32, five of bfloat16: rounded, a label would be another class.
    """
    bits = _bits(dtype)
    shifts = range(LABEL_BITS - bits, -1, -bits)
    digits = [labels >> shift for shift in shifts]
    return torch.stack([digits[0], *(one % (1 << bits) for one in digits[1:])], 1).to(dtype)


def _labels(digits: torch.Tensor) -> torch.Tensor:
    """What `_digits` was given, int64 (b,)."""
    bits = _bits(digits.dtype)
    total = torch.zeros(len(digits), dtype=torch.int64, device=digits.device)
    for column in digits.to(torch.int64).unbind(1):
        total = (total << bits) + column
    return total


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
