"""Heads on disk: bit for bit on any number of ranks, and grown by classes that came later."""

import pytest
import torch

from dist_train.heads.centres import RowAdamW
from dist_train.heads.class_parallel import MarginHead, load_head, save_head
from shards.storage.errors import BadInput, Corrupt

STATE = ("exp_avg", "exp_avg_sq", "step")


def new_head(rank: int, world: int, C: int = 7, D: int = 4, centres: int = 1):
    head = MarginHead(
        classes=C, width=D, loss="arcface", scale=8, chunk=3, seed=0, rank=rank, world=world,
        centres=centres,
    )  # fmt: skip
    return head, RowAdamW(head.weight, lr=0.1)


def step(parts, grad: torch.Tensor) -> None:
    """One step of all ranks with a gradient of all classes (C, K * D); sparse where it is 0."""
    for head, optimizer in parts:
        mine = grad[head.first : head.last].reshape(head.weight.shape)
        head.weight.grad = mine.to_sparse(1)
        optimizer.step()


def whole(parts) -> dict[str, torch.Tensor]:
    found = {"weight": torch.cat([head.weight.detach() for head, _ in parts])}
    return found | {n: torch.cat([o.state[h.weight][n] for h, o in parts]) for n in STATE}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in ("weight", *STATE))


@pytest.mark.parametrize("centres", [1, 3])
@pytest.mark.parametrize("before", [1, 2, 5])
@pytest.mark.parametrize("after", [1, 3, 4, 9])
def test_a_head_loads_into_any_number_of_ranks(tmp_path, before, after, centres):
    generator = torch.Generator().manual_seed(0)
    saved = [new_head(rank, before, centres=centres) for rank in range(before)]
    for skipped in range(3):  # so that rows have taken different numbers of steps
        grad = torch.randn(7, centres * 4, generator=generator)
        grad[skipped] = 0
        step(saved, grad)
    for head, optimizer in saved:
        save_head(tmp_path, head, optimizer)
    assert len(list(tmp_path.glob("head-*.safetensors"))) == before
    loaded = [new_head(rank, after, centres=centres) for rank in range(after)]
    for head, optimizer in loaded:
        load_head(tmp_path, head, optimizer)
    assert same(whole(saved), whole(loaded))
    assert whole(loaded)["step"].tolist() == [2] * 3 * centres + [3] * 4 * centres
    step(saved, grad)
    step(loaded, grad)
    assert same(whole(saved), whole(loaded))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_growing_leaves_the_old_rows_bit_for_bit(tmp_path, world):
    old = [new_head(rank, 2) for rank in range(2)]
    step(old, torch.randn(7, 4))
    for head, optimizer in old:
        save_head(tmp_path, head, optimizer)
    grown = [new_head(rank, world, C=17) for rank in range(world)]
    for head, optimizer in grown:
        load_head(tmp_path, head, optimizer, classes=7)
    known, fresh = whole(old), whole([new_head(0, 1, C=17)])
    for name, rows in whole(grown).items():
        assert torch.equal(rows[:7], known[name])
        assert torch.equal(rows[7:], fresh[name][7:])


def test_a_missing_file_is_reported(tmp_path):
    for rank in range(2):
        save_head(tmp_path, *new_head(rank, 2))
    (tmp_path / "head-0-4.safetensors").unlink()
    with pytest.raises(Corrupt, match="3 of the classes 0 to 7 found"):
        load_head(tmp_path, *new_head(0, 1))
    load_head(tmp_path, *new_head(2, 3))


def save_parts(folder, ranges: list[tuple[int, int]]) -> None:
    """Files of these classes (first, last) of a head of seven, each centre its class's number."""
    for first, last in ranges:
        head, optimizer = new_head(0, 1, C=last - first)
        head.weight.data[:] = torch.arange(first, last)[:, None]
        head.first, head.last = first, last
        save_head(folder, head, optimizer)


@pytest.mark.parametrize("ranges", [
    [(0, 4), (4, 7), (3, 6)], [(0, 7), (2, 5)], [(0, 4), (0, 7)], [(0, 4), (1, 4)],
    [(0, 3), (0, 4)], [(3, 6), (3, 7)], [(0, 4), (5, 7)], [(0, 4), (2, 5)], [(1, 7)], [(0, 6)], [],
], ids=str)  # fmt: skip
def test_files_that_overlap_or_leave_a_gap_are_reported(tmp_path, ranges):
    """Also where as many classes stand twice as are missing."""
    save_parts(tmp_path, ranges)
    with pytest.raises(Corrupt, match="of the classes 0 to 7 found, where each is wanted once"):
        load_head(tmp_path, *new_head(0, 1))


@pytest.mark.parametrize("ranges", [[(0, 7)], [(0, 1), (1, 7)], [(4, 7), (0, 4)]], ids=str)
def test_files_that_hold_each_class_once_are_loaded(tmp_path, ranges):
    save_parts(tmp_path, ranges)
    for rank in range(2):
        head, optimizer = new_head(rank, 2)
        load_head(tmp_path, head, optimizer)
        assert head.weight[:, 0].tolist() == list(range(head.first, head.last))


def test_another_shape_is_reported(tmp_path):
    save_head(tmp_path, *new_head(0, 1, centres=2))
    with pytest.raises(BadInput, match="2 centres a class of width 4, this head has 1 of 4"):
        load_head(tmp_path, *new_head(0, 1))
    with pytest.raises(BadInput, match="this head has 2 of 8"):
        load_head(tmp_path, *new_head(0, 1, D=8, centres=2))
