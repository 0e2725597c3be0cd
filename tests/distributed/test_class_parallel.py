"""The sharded margin softmax on 1, 2 and 3 gloo ranks against one unsharded autograd."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.heads.centres import classes_of_step, initial_centres
from dist_train.heads.class_parallel import MarginHead, gather, margin_shares
from dist_train.heads.estimate import HeadEstimate
from dist_train.training.optimisation import clip_head
from shards.storage.errors import BadInput
from tests.support.margin_reference import reference_loss
from tests.support.ranks import Ranks

pytestmark = pytest.mark.timeout(600)
WORLDS = (1, 2, 3)
FAMILY = {
    "arcface": {"loss": "arcface"},
    "cosface": {"loss": "cosface"},
    "sub-centres": {"loss": "arcface", "centres": 3},
    "dynamic": {"loss": "arcface", "dynamic": True},
    "detached": {"loss": "arcface", "detached": True},
    "sampled": {"loss": "arcface", "sample": 0.4},
    "all of it": {"loss": "cosface", "centres": 2, "dynamic": True, "sample": 0.5},
}


@dataclass(frozen=True)
class Problem:
    """One global batch and head, made of its numbers by every process alike."""

    classes: int
    width: int
    share: int
    """Items a rank."""
    scale: float
    margin: float
    chunk: int
    seed: int
    labels: str
    loss: str
    near: float = 0.0
    """0: embeddings anywhere; towards 1: at their own centres, as late in a training."""
    centres: int = 1
    sample: float = 1.0
    detached: bool = False
    dynamic: bool = False

    def shares(self) -> torch.Tensor | None:
        """Of the margin, by class."""
        if not self.dynamic:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        return margin_shares(torch.randint(1, 60, (self.classes,), generator=generator), 0.1)

    def batch(self, world: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, D) float32 and labels (B,)."""
        # Not the centres' seed: an item along its centre to the last bit has an angle of 1e-8 or 0.
        generator = torch.Generator().manual_seed(self.seed + 1_000_003)
        B = self.share * world
        anywhere = torch.randn(B, self.width, generator=generator)
        labels = torch.randint(self.classes, (B,), generator=generator)
        if self.labels == "few":
            labels %= min(2, self.classes)
        if self.labels == "one":
            labels[:] = self.classes - 1
        own = self.all_centres()[labels * self.centres] / 0.05
        return self.near * own + (1 - self.near) * anywhere, labels

    def all_centres(self) -> torch.Tensor:
        """(C * K, D) float32."""
        return initial_centres(0, self.classes, self.width, self.seed, self.centres)

    def head(self, rank: int, world: int) -> MarginHead:
        """That of one rank."""
        return MarginHead(
            classes=self.classes, width=self.width, loss=self.loss, scale=self.scale,
            chunk=self.chunk, seed=self.seed, rank=rank, world=world, centres=self.centres,
            sample=self.sample, detached=self.detached, shares=self.shares(),
        )  # fmt: skip


def ours(rank: int, world: int, problem: Problem, double: bool) -> tuple[np.ndarray, ...]:
    """Loss, gradient of this rank's embeddings, gradient of its centres."""
    head, (all_embeddings, labels) = problem.head(rank, world), problem.batch(world)
    mine = slice(rank * problem.share, (rank + 1) * problem.share)
    embeddings = all_embeddings[mine]
    if double:
        head, embeddings = head.double(), embeddings.double()
    embeddings = embeddings.clone().requires_grad_()
    value = head(embeddings, labels[mine], problem.margin, 5)
    value.backward()
    grad = head.weight.grad.to_dense()
    return value.detach().numpy(), embeddings.grad.numpy() / world, grad.numpy()


def sharded(ranks: Ranks, problem: Problem, double: bool) -> list[np.ndarray]:
    """The same of all ranks, put together."""
    losses, d_embeddings, d_centres = zip(*ranks.ask(ours, problem, double), strict=True)
    assert len({value.item() for value in losses}) == 1
    return [losses[0], np.concatenate(d_embeddings), np.concatenate(d_centres)]


def unsharded(world: int, problem: Problem, double: bool) -> list[np.ndarray]:
    """Loss and gradients by autograd over the whole matrix, of the same float32 numbers."""
    embeddings, labels = problem.batch(world)
    centres, shares = problem.all_centres(), problem.shares()
    dtype = torch.float64 if double else torch.float32
    embeddings, centres = (x.to(dtype).requires_grad_() for x in (embeddings, centres))
    seen = None
    if problem.sample < 1:
        seen = classes_of_step(0, problem.classes, labels, problem.sample, problem.seed, 5)
    value = reference_loss(
        embeddings, centres, labels, loss=problem.loss, scale=problem.scale,
        margin=problem.margin if shares is None else problem.margin * shares[labels],
        each=problem.centres, detached=problem.detached, seen=seen,
    )  # fmt: skip
    value.backward()
    return [x.numpy() for x in (value.detach(), embeddings.grad, centres.grad)]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Ranks]]:
    """Ranks of every world size."""
    groups_of_ranks = {
        world: Ranks(world, tmp_path_factory.mktemp("ranks"), __name__) for world in WORLDS
    }
    yield groups_of_ranks
    for ranks in groups_of_ranks.values():
        ranks.close()


PROBLEMS = st.builds(
    Problem, classes=st.integers(1, 40), width=st.integers(2, 20), share=st.integers(1, 9),
    scale=st.floats(1, 64), margin=st.floats(0, 1), chunk=st.integers(1, 50),
    seed=st.integers(0, 10_000), labels=st.sampled_from(["any", "few", "one"]),
    loss=st.just("arcface"),
)  # fmt: skip


def check_float64(groups: dict[int, Ranks], member: str, problem: Problem) -> None:
    problem = replace(problem, **FAMILY[member])
    for world, ranks in groups.items():
        truth = unsharded(world, problem, double=True)
        for name, mine, theirs in zip(
            ("loss", "embeddings", "centres"), sharded(ranks, problem, True), truth, strict=True
        ):
            error, size = np.abs(mine - theirs).max(), max(1.0, np.abs(theirs).max())
            assert error <= 1e-10 * size, (world, name)


@pytest.mark.parametrize("member", FAMILY)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=PROBLEMS)
def test_in_float64_it_is_the_unsharded_autograd(
    groups: dict[int, Ranks], member: str, problem: Problem
) -> None:
    check_float64(groups, member, problem)


@pytest.mark.full
@pytest.mark.parametrize("member", FAMILY)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=PROBLEMS)
def test_in_float64_it_is_the_unsharded_autograd_many_times(
    groups: dict[int, Ranks], member: str, problem: Problem
) -> None:
    check_float64(groups, member, problem)


@pytest.mark.parametrize("near", [0.0, 0.6])
@pytest.mark.parametrize("member", FAMILY)
def test_in_float32_it_errs_at_most_twice_as_much_as_the_unsharded(
    groups: dict[int, Ranks], member: str, near: float
) -> None:
    """The sum of errors over problems: one alone may be hit by luck."""
    for world, ranks in groups.items():
        mine, theirs = np.zeros(3), np.zeros(3)
        for seed in range(16):
            problem = Problem(
                classes=37 + 13 * seed, width=32, share=24 // world, scale=64.0, margin=0.5,
                chunk=50, seed=seed, labels="any", near=near, **FAMILY[member],
            )  # fmt: skip
            truth = unsharded(world, problem, double=True)
            sizes = [np.linalg.norm(part) for part in truth]
            for total, got in (
                (mine, sharded(ranks, problem, False)),
                (theirs, unsharded(world, problem, double=False)),
            ):
                parts = zip(got, truth, sizes, strict=True)
                total += [np.linalg.norm(a - b) / size for a, b, size in parts]
        assert (mine <= 2 * theirs).all(), (world, mine / theirs)


class _Collectives(TorchDispatchMode):
    """Counts what is sent: calls, and the bytes of the larger tensor of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls += 1
            self.bytes += max(x.nbytes for x in torch.utils._pytree.tree_leaves(args)
                              if isinstance(x, torch.Tensor))  # fmt: skip
        return func(*args, **(kwargs or {}))


def count_collectives(rank: int, world: int, problem: Problem, passes: int) -> tuple[int, int]:
    """Calls and bytes of one step of `passes`."""
    head, (all_embeddings, labels) = problem.head(rank, world), problem.batch(world)
    mine = slice(rank * problem.share, (rank + 1) * problem.share)
    with _Collectives() as counted:
        for _ in range(passes):
            embeddings = all_embeddings[mine].clone().requires_grad_()
            head(embeddings, labels[mine], problem.margin, 5).backward()
        clip_head(head, 1.0)
    return counted.calls, counted.bytes


@pytest.mark.parametrize("member", FAMILY)
def test_a_step_sends_four_times_and_as_many_bytes_as_said(
    groups: dict[int, Ranks], member: str
) -> None:
    for world, ranks in groups.items():
        for passes in (1, 2):
            problem = Problem(
                classes=50, width=16, share=6, scale=32, margin=0.4, chunk=7, seed=3,
                labels="any", **FAMILY[member],
            )  # fmt: skip
            estimate = HeadEstimate(
                classes=50, width=16, batch=6 * world, world=world, passes=passes
            )
            counted = ranks.ask(count_collectives, problem, passes)
            assert set(counted) == {estimate.traffic}
            assert estimate.traffic[0] == (0 if world == 1 else 3 * passes + 1)


def norms(rank: int, world: int, problem: Problem) -> tuple[float, np.ndarray]:
    """The head's gradient norm as clipping finds it, and what it leaves."""
    head, (all_embeddings, labels) = problem.head(rank, world), problem.batch(world)
    mine = slice(rank * problem.share, (rank + 1) * problem.share)
    head(all_embeddings[mine].clone(), labels[mine], problem.margin, 5).backward()
    norm = clip_head(head, 0.25)
    return norm.item(), head.weight.grad.to_dense().numpy()


@pytest.mark.parametrize("member", ["arcface", "sampled"])
def test_the_head_is_clipped_by_its_norm_over_all_ranks(
    groups: dict[int, Ranks], member: str
) -> None:
    for world, ranks in groups.items():
        problem = Problem(
            classes=2, width=8, share=4, scale=32, margin=0.4, chunk=9, seed=3, labels="any",
            **FAMILY[member],
        )  # fmt: skip
        whole = unsharded(world, problem, double=True)[2]
        answers = ranks.ask(norms, problem)
        assert [norm for norm, _ in answers] == pytest.approx([np.linalg.norm(whole)] * world, 1e-6)
        left = np.concatenate([part for _, part in answers])
        assert np.abs(left - whole * 0.25 / np.linalg.norm(whole)).max() < 1e-6


def embed_labels_wrong(rank: int, world: int) -> str:
    """The error for a label that is no class."""
    head = MarginHead(
        classes=5, width=4, loss="arcface", scale=8, chunk=9, seed=0, rank=rank, world=world
    )
    try:
        head(torch.ones(2, 4), torch.tensor([1, 5 if rank == world - 1 else 0]), 0.5)
    except BadInput as error:
        return str(error)
    return "nothing"


def test_a_label_that_is_no_class_is_reported_on_every_rank(groups: dict[int, Ranks]) -> None:
    for world, ranks in groups.items():
        for answer in ranks.ask(embed_labels_wrong):
            assert answer.startswith(
                f"row {2 * world - 1} of the global batch: class 5, there are 5"
            )


LABELS = [0, 255, 256, 257, 2_999, 65_537, 10_000_019, (1 << 39) - 1, -1]


def gathered(rank: int, world: int, dtype: torch.dtype) -> list[int]:
    """Labels as all ranks get them, sent beside rows of `dtype`."""
    labels = torch.tensor([LABELS[(n + rank) % len(LABELS)] for n in range(len(LABELS))])
    rows, all_embeddings = gather(torch.ones(len(labels), 3, dtype=dtype), labels)
    assert rows.shape == (world * len(labels), 3)
    assert rows.eq(1).all()
    return all_embeddings.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_labels_come_exactly_beside_rows_of_any_kind(
    groups: dict[int, Ranks], dtype: torch.dtype
) -> None:
    for world, ranks in groups.items():
        wanted = [LABELS[(n + rank) % 9] for rank in range(world) for n in range(9)]
        assert ranks.ask(gathered, dtype) == [wanted] * world


def bfloat16_loss(rank: int, world: int) -> tuple[float, int]:
    """Of 12 items in all, and the collectives that forward and backward take."""
    generator = torch.Generator().manual_seed(4)
    all_embeddings = torch.randn(12, 32, generator=generator)
    labels = torch.randint(3_000, (12,), generator=generator)
    head = MarginHead(
        classes=3_000, width=32, loss="arcface", scale=32, chunk=512, seed=0, rank=rank, world=world
    ).bfloat16()
    mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
    embeddings = all_embeddings[mine].bfloat16().requires_grad_()
    with _Collectives() as counted:
        value = head(embeddings, labels[mine], 0.3)
        value.backward()
    return value.item(), counted.calls


def test_in_bfloat16_the_loss_is_that_of_one_process(groups: dict[int, Ranks]) -> None:
    [(alone, _)] = groups[1].ask(bfloat16_loss)
    for world in WORLDS[1:]:
        for value, calls in groups[world].ask(bfloat16_loss):
            assert value == pytest.approx(alone, rel=2**-8)
            assert calls == 3
