"""The estimate of a head beside what it takes: allocated bytes, and those of the process."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dist_train.heads.centres import RowAdamW
from dist_train.heads.class_parallel import MarginHead
from dist_train.heads.estimate import HeadEstimate
from dist_train.training.optimisation import clip_head
from tests.support.ranks import Ranks

CASES = [
    {"classes": 40_000, "width": 64, "batch": 128},
    {"classes": 20_000, "width": 128, "batch": 64, "passes": 2},
    {"classes": 12_000, "width": 64, "batch": 128, "centres": 3},
    {"classes": 100_000, "width": 64, "batch": 64, "sample": 0.1},
    {"classes": 100_000, "width": 128, "batch": 64, "sample": 0.3, "passes": 2},
    {"classes": 50_000, "width": 64, "batch": 64, "sample": 0.4, "centres": 2, "passes": 4},
    {"classes": 5_000, "width": 256, "batch": 256, "chunk": 1_000},
    {"classes": 30_000, "width": 32, "batch": 512, "chunk": 2_048},
    {"classes": 200_000, "width": 16, "batch": 64, "sample": 0.3, "centres": 2},
    {"classes": 500, "width": 768, "batch": 1_024},
    {"classes": 40, "width": 1_280, "batch": 64},
    {"classes": 40, "width": 1_280, "batch": 64, "passes": 2},
    {"classes": 50, "width": 256, "batch": 1_024, "centres": 3},
    {"classes": 1_000, "width": 256, "batch": 2_048, "centres": 3},
    {"classes": 2_000, "width": 384, "batch": 1_024, "centres": 2},
]


def peak_of_a_step(rank: int, world: int, case: dict) -> tuple[int, int]:
    """Bytes allocated before the second step, and the most at one time in it beyond those."""
    torch.manual_seed(rank)
    options = dict(case)
    batch, passes = options.pop("batch") // world, options.pop("passes", 1)
    options = {"chunk": 8_192, "rank": rank, "world": world, **options}
    head = MarginHead(loss="arcface", scale=32, seed=0, **options)
    optimizer = RowAdamW(head.weight, lr=1e-3)
    labels = torch.randint(0, case["classes"], (batch,))

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(passes):
            head(torch.randn(batch, case["width"], requires_grad=True), labels, 0.3).backward()
        clip_head(head, 5.0)
        optimizer.step()

    step()
    optimizer.zero_grad()
    gc.collect()
    held = sum(x.nbytes for x in [head.weight, *optimizer.state[head.weight].values()])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    return held, _peak(watched)


def _peak(watched: profile) -> int:
    allocated = most = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            most = max(most, allocated)
    return most


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_estimate_is_within_one_percent_of_what_is_allocated(case):
    estimate = HeadEstimate(world=1, **case)
    held, peak = peak_of_a_step(0, 1, case)
    assert held == estimate.weights + estimate.moments
    assert held + peak == pytest.approx(estimate.total, rel=0.01)


def test_on_two_ranks_too(tmp_path):
    # Not the smallest: how many of a batch's few classes are one rank's is chance.
    ranks = Ranks(2, tmp_path, "tests.unit.heads.test_estimate")
    for case in CASES[:9]:
        most = max(map(sum, ranks.ask(peak_of_a_step, case)))
        assert most == pytest.approx(HeadEstimate(world=2, **case).total, rel=0.02), case
    ranks.close()


def test_it_says_so_for_people():
    estimate = HeadEstimate(classes=1_000_000, width=512, batch=2_048, world=8)
    assert estimate.weights == 125_000 * 512 * 4
    assert estimate.traffic[0] == 4
    assert str(estimate).startswith(
        "head: 1000000 classes, 125000 centres x 512 a rank: weights 256.0 MB"
    )


def test_communication_is_counted_from_two_ranks_on():
    # 8 items of 4 numbers: 8 x (4 + 2) float32 gathered, 2 x 8 float64 summed, 8 x 4 float32
    # reduced and scattered; two passes, and the norm as one float64.
    shape = {"classes": 40, "width": 4, "batch": 8, "passes": 2}
    estimates = [HeadEstimate(**shape, world=world) for world in (1, 2, 3)]
    bytes_of_a_step = 2 * (8 * 6 * 4 + 2 * 8 * 8 + 8 * 4 * 4) + 8
    assert [one.traffic for one in estimates] == [(0, 0), *[(7, bytes_of_a_step)] * 2]
