"""A head on disk: one safetensors file a rank, named by its classes, moments and steps inside.

head-<first>-<last>.safetensors holds `weight`, `exp_avg`, `exp_avg_sq` ((last - first) * K, D) and
`step` ((last - first) * K,). Any number of ranks loads any such files that cover the classes.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dist_train.heads.class_parallel import MarginHead
from dist_train.heads.row_optimizer import RowAdamW
from shards.errors import BadInput, Corrupt
from shards.files import atomic_path


def save_head(folder: Path, head: MarginHead, optimizer: RowAdamW) -> None:
    """Write this rank's classes into `folder`; a rank without classes writes nothing."""
    if head.last == head.first:
        return
    plain = {name: value.cpu().contiguous() for name, value in _tensors(head, optimizer).items()}
    with atomic_path(folder / f"head-{head.first}-{head.last}.safetensors") as temporary:
        save_file(plain, temporary)


def load_head(
    folder: Path, head: MarginHead, optimizer: RowAdamW, classes: int | None = None
) -> None:
    """Fill this rank's classes from `folder`, bit for bit.

    `classes`: how many there were when it was written; the rows of later ones stay as they are.
    Raises Corrupt where classes are missing or stand in two files, BadInput for another number of
    centres or width.
    """
    known = max(min(head.last, head.classes if classes is None else classes), head.first)
    loaded = (_load_part(path, head, optimizer) for path in folder.glob("head-*.safetensors"))
    parts = sorted((part for part in loaded if part), key=lambda part: part.start)
    begins, ends = [part.start for part in parts], [part.stop for part in parts]
    if [*begins, known] != [head.first, *ends]:
        raise Corrupt(
            f"{folder}: {sum(map(len, parts))} of the classes {head.first} to {known} found, where "
            "each is wanted once; restore its head files or go on from another checkpoint"
        )


def _load_part(path: Path, head: MarginHead, optimizer: RowAdamW) -> range:
    """Copy what this rank has of a file; which classes that are."""
    first, last = (int(number) for number in path.stem.split("-")[1:])
    low, high = max(first, head.first), min(last, head.last)
    if low >= high:
        return range(0)
    each = head.centres
    with safe_open(path, "pt") as file:
        shape = file.get_slice("weight").get_shape()
        if shape != [(last - first) * each, head.weight.shape[1]]:
            raise BadInput(
                f"{path}: {shape[0] / (last - first):g} centres a class of width {shape[1]}, this "
                f"head has {each} of {head.weight.shape[1]}; use the same head.centres and encoder"
            )
        for name, target in _tensors(head, optimizer).items():
            part = file.get_slice(name)[(low - first) * each : (high - first) * each]
            target[(low - head.first) * each : (high - head.first) * each] = part
    return range(low, high)


def _tensors(head: MarginHead, optimizer: RowAdamW) -> dict[str, torch.Tensor]:
    return {"weight": head.weight.detach(), **optimizer.state[head.weight]}
