"""What touches only some rows: the row-wise optimizer, and the classes that a step sees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.heads.centres import ROW_BLOCK, RowAdamW, classes_of_step, uniform
from dist_train.heads.class_parallel import MarginHead


def steps(optimizer_of, grads: list[torch.Tensor]) -> torch.Tensor:
    weight = torch.nn.Parameter(
        torch.linspace(-1, 1, grads[0].numel()).view(grads[0].shape).to(grads[0].dtype)
    )
    optimizer = optimizer_of(weight)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach()


OPTIONS = {"lr": 0.03, "weight_decay": 0.1, "eps": 1e-6}


@pytest.mark.parametrize("rows", [5, ROW_BLOCK + 3])
@pytest.mark.parametrize("sparse", [False, True])
def test_with_all_rows_it_is_torchs_adamw(rows, sparse):
    grads = [torch.randn(rows, 3, dtype=torch.float64) for _ in range(6)]
    mine = steps(lambda w: RowAdamW(w, **OPTIONS), [g.to_sparse(1) if sparse else g for g in grads])
    theirs = steps(lambda w: torch.optim.AdamW([w], **OPTIONS), grads)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_row_goes_as_if_the_steps_without_it_had_not_been():
    grads = [torch.randn(9, 3, dtype=torch.float64) for _ in range(8)]
    seen = [torch.rand(9) < 0.5 for _ in grads]
    sparse = []
    for grad, rows in zip(grads, seen, strict=True):
        at = rows.nonzero().T
        sparse.append(torch.sparse_coo_tensor(at, grad[rows], grad.shape, check_invariants=True))
    mine = steps(lambda w: RowAdamW(w, **OPTIONS), sparse)
    for row in range(9):
        alone = [g for g, rows in zip(grads, seen, strict=True) if rows[row]]
        wanted = steps(lambda w: torch.optim.AdamW([w], **OPTIONS), alone) if alone else None
        if wanted is not None:
            torch.testing.assert_close(mine[row], wanted[row], rtol=0, atol=1e-12)


def test_a_row_given_twice_gets_the_sum():
    twice = torch.sparse_coo_tensor([[1, 3, 1]], torch.randn(3, 2), (4, 2), check_invariants=True)
    one, other = (steps(lambda w: RowAdamW(w, **OPTIONS), [g]) for g in (twice, twice.coalesce()))
    assert torch.equal(one, other)


def sampling_head(C: int, rate: float, centres: int = 2) -> MarginHead:
    return MarginHead(
        classes=C, width=8, loss="arcface", scale=32, chunk=64, seed=1, sample=rate,
        centres=centres,
    )  # fmt: skip


@pytest.mark.parametrize("step", [0, 1, 77])
def test_an_update_moves_the_sampled_rows_and_no_other(step):
    head = sampling_head(500, 0.1)
    optimizer = RowAdamW(head.weight, lr=0.1, weight_decay=0.5)
    before = head.weight.detach().clone()
    labels = torch.randint(0, 500, (24,))
    for _ in range(2):  # two passes of one step
        head(torch.randn(24, 8), labels, 0.3, step).backward()
    assert head.weight.grad.is_sparse
    optimizer.step()
    moved = (head.weight.detach() != before).any(1).view(500, 2)
    seen = classes_of_step(0, 500, labels, 0.1, 1, step)
    assert 24 < len(seen) < 120
    wanted = torch.zeros(500, dtype=torch.bool)
    wanted[seen] = True
    assert torch.equal(moved.all(1), wanted)
    assert torch.equal(moved.any(1), wanted)
    assert torch.equal(optimizer.state[head.weight]["step"].view(500, 2)[:, 0] > 0, wanted)


def test_a_rate_that_takes_all_is_bit_equal_to_none():
    labels, embeddings = torch.randint(0, 300, (24,)), torch.randn(24, 8)
    found = []
    for rate in (1.0, 1 - 1e-16, 0.9999999999):
        head = sampling_head(300, rate)
        at = embeddings.clone().requires_grad_()
        value = head(at, labels, 0.3, 4)
        value.backward()
        found.append((value.detach(), at.grad, head.weight.grad.to_dense()))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_classes_of_a_step_do_not_depend_on_the_ranks(data):
    C, step = data.draw(st.integers(1, 500)), data.draw(st.integers(0, 10**9))
    rate, seed = data.draw(st.floats(0.01, 1)), data.draw(st.integers(0, 2**31 - 1))
    labels = torch.tensor(data.draw(st.lists(st.integers(0, C - 1), min_size=1, max_size=9)))
    whole = classes_of_step(0, C, labels, rate, seed, step)
    assert set(labels.tolist()) <= set(whole.tolist())
    cut = data.draw(st.integers(0, C))
    parts = []
    for first, last in ((0, cut), (cut, C)):
        own = labels[(labels >= first) & (labels < last)] - first
        parts += (classes_of_step(first, last, own, rate, seed, step) + first).tolist()
    assert parts == whole.tolist()


def test_every_class_has_its_turn_as_often():
    ids = torch.arange(20_000)
    drawn = torch.stack([uniform(ids, 3, step) < 0.25 for step in range(200)]).double()
    # Binomial: 200 draws at 1/4 have a deviation of 6.1, the mean of 20 000 one of 0.0002.
    assert abs(drawn.mean() - 0.25) < 5 * 0.0002
    assert abs(drawn.sum(0).std() - 6.12) < 0.2
    steps_apart = torch.corrcoef(drawn[:20])
    assert (steps_apart - torch.eye(20)).abs().max() < 0.05
    values = uniform(ids, 3, 0)
    assert 0 <= values.min() < 1e-3
    assert 1 - 1e-3 < values.max() < 1


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator of Steele, Lea and Flood (2014), in whole numbers of any size."""
    numbers, full = [], (1 << 64) - 1
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & full
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & full
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & full
        numbers.append(z ^ (z >> 31))
    return numbers


def test_the_reference_generator_gives_the_published_numbers():
    """Those of rosettacode.org, Pseudo-random numbers/Splitmix64."""
    assert splitmix64(1234567, 5) == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip


def test_classes_are_drawn_by_that_generator_from_seed_step_and_class():
    """A number of each class from the seed, and of that number one from the step."""
    for seed, step in ((0, 0), (1234567, 0), (1234567, 3), (2**32 - 1, 10**9)):
        drawn = uniform(torch.arange(1, 40), seed, step).tolist()
        for number, got in zip(splitmix64(seed, 39), drawn, strict=True):
            start = (number * 0x9E3779B97F4A7C15 - 0x9E3779B97F4A7C15 + step) % 2**64
            (again,) = splitmix64(start, 1)
            assert got == (again >> 11) / 2**53


def test_another_seed_and_another_step_draw_other_classes():
    ids, none = torch.arange(1000), torch.arange(0)
    drawn = [
        set(classes_of_step(0, 1000, none, 0.3, seed, step).tolist())
        for seed, step in ((0, 0), (1, 0), (0, 1), (7, 9))
    ]
    for number, one in enumerate(drawn):
        assert 230 < len(one) < 370
        # Of two draws that know nothing of each other a share of 0.3 is in both.
        assert all(50 < len(one & other) < 130 for other in drawn[:number])
    assert torch.equal(uniform(ids, 7, 9), uniform(ids, 7, 9))
