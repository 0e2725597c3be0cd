"""One rank: random cases of the sharded head, each compared with an unsharded float64 autograd."""

import itertools
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_train.heads.class_parallel import MarginHead, initial_centres

CASES = list(itertools.product(
    [1, 2, 5, 11, 40], [3, 8], ["arcface", "cosface"], [(0.0, 8.0), (0.5, 32.0), (0.9, 64.0)]
))  # fmt: skip


def reference(
    everyone: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor,
    loss: str, margin: float, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Mean margin softmax loss by plain autograd over a B x C matrix."""
    cosine = F.normalize(everyone, dim=1) @ F.normalize(centres, dim=1).T
    target = cosine.gather(1, labels[:, None]).squeeze(1)
    if loss == "cosface":
        moved = target - margin
    else:
        theta = torch.acos(target)
        moved = torch.where(
            theta + margin < math.pi, torch.cos(theta + margin), target - margin * math.sin(margin)
        )
    logits = scale * cosine.scatter(1, labels[:, None], moved[:, None])
    return F.cross_entropy(logits, labels)


def check(case: tuple, number: int, rank: int, world: int) -> float:
    """Largest error of loss, embedding gradient and centre gradient of one case."""
    classes, share, loss, (margin, scale) = case
    generator = torch.Generator().manual_seed(number)
    width, batch = 6, share * world
    everyone = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    if number % 5 == 0:
        labels[:] = classes - 1  # all on one rank
    head = MarginHead(
        classes=classes, width=width, loss=loss, scale=scale, chunk=1 + number % 7, seed=number,
        rank=rank, world=world,
    ).double()  # fmt: skip
    mine = everyone[rank * share : (rank + 1) * share].clone().requires_grad_()
    value = head(mine, labels[rank * share : (rank + 1) * share], margin)
    value.backward()
    all_rows = everyone.clone().requires_grad_()
    centres = initial_centres(0, classes, width, number).double().requires_grad_()
    truth = reference(all_rows, centres, labels, loss, margin, scale)
    truth.backward()
    for leaf in (mine, all_rows, centres):
        assert leaf.grad is not None
    expected = all_rows.grad[rank * share : (rank + 1) * share] * world  # DDP averages over ranks
    errors = [(value - truth).abs().max(), (mine.grad - expected).abs().max()]
    if head.last > head.first:
        errors.append((head.weight.grad - centres.grad[head.first : head.last]).abs().max())
    return max(error.item() for error in errors)


def main() -> None:
    """Run all cases; rank 0 writes the largest error of each over ranks."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        # By a file: a port found free may be taken again before rank 0 listens on it.
        meeting = f"file://{sys.argv[1]}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    found = []
    for number, case in enumerate(CASES):
        error = torch.tensor(check(case, number, rank, world))
        if world > 1:
            dist.all_reduce(error, op=dist.ReduceOp.MAX)
        found.append({"case": str(case), "error": error.item()})
    if rank == 0:
        (Path(sys.argv[1]) / "cases.json").write_text(json.dumps(found))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


main()
