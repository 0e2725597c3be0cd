"""Centres that begin as class means: bit for bit the same on any number of ranks."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_train.heads.centres import initial_centres
from dist_train.heads.class_parallel import ClassMeans, MarginHead
from tests.support.ranks import Ranks

pytestmark = pytest.mark.timeout(600)
C, D, ITEMS, BATCH = 11, 6, 70, 8


def items() -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors (n, D) and classes (n,); class 3 has no item."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, C - 1, (ITEMS,), generator=generator)
    vectors = F.normalize(torch.randn(ITEMS, D, generator=generator), dim=1)
    return vectors, classes + (classes >= 3)


def head_of(classes: int, width: int, rank: int, world: int, **options: int) -> MarginHead:
    """One rank's head before anything is set."""
    shape = {"classes": classes, "width": width, "rank": rank, "world": world}
    return MarginHead(loss="arcface", scale=8, chunk=3, **shape, **options)


def means(rank: int, world: int, each: int) -> np.ndarray:
    """This rank's centres after every item has been added, batches dealt out in turn."""
    head = head_of(C, D, rank, world, seed=5, centres=each)
    vectors, classes = items()
    batches = torch.arange(ITEMS).split(BATCH)
    found = ClassMeans(head)
    for begin in range(0, len(batches), world):
        padded, labels = torch.zeros(BATCH, D), torch.full((BATCH,), -1)
        if begin + rank < len(batches):
            rows = batches[begin + rank]
            padded[: len(rows)], labels[: len(rows)] = vectors[rows], classes[rows]
        found.add(padded, labels)
    assert found.write() == head.last - head.first - (head.first <= 3 < head.last)
    return head.weight.detach().numpy()


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Ranks]]:
    groups_of_ranks = [
        Ranks(world, tmp_path_factory.mktemp("ranks"), __name__) for world in (1, 2, 3, 4)
    ]
    yield groups_of_ranks
    for ranks in groups_of_ranks:
        ranks.close()


@pytest.mark.parametrize("each", [1, 3])
def test_means_do_not_depend_on_the_ranks(groups: list[Ranks], each: int) -> None:
    whole = [np.concatenate(ranks.ask(means, each)) for ranks in groups]
    for other in whole[1:]:
        assert np.array_equal(whole[0], other)


def test_a_centre_points_where_its_items_do(groups: list[Ranks]) -> None:
    (centres,) = groups[0].ask(means, 1)
    vectors, classes = items()
    for number in range(C):
        if number == 3:
            assert np.array_equal(centres[3], initial_centres(3, 4, D, 5).numpy()[0])
            continue
        wanted = F.normalize(vectors[classes == number].double().sum(0), dim=0).numpy()
        got = centres[number] / np.linalg.norm(centres[number])
        assert np.abs(got - wanted).max() < 1e-6


def test_sub_centres_of_a_mean_lie_near_it_and_apart(groups: list[Ranks]) -> None:
    (centres,) = groups[0].ask(means, 3)
    unit = F.normalize(torch.from_numpy(centres), dim=1).view(C, 3, D)
    cosines = unit @ unit.transpose(1, 2)
    known = torch.arange(C) != 3
    assert cosines[known].min() > 0.9
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert cosines[known][:, one, two].max() < 1 - 1e-4


def started(rank: int, world: int) -> np.ndarray:
    """This rank's random centres."""
    return head_of(700, 5, rank, world, seed=3).weight.detach().numpy()


def test_random_centres_do_not_depend_on_the_ranks(groups: list[Ranks]) -> None:
    whole = [np.concatenate(ranks.ask(started)) for ranks in groups]
    for other in whole[1:]:
        assert np.array_equal(whole[0], other)
    assert len(np.unique(whole[0], axis=0)) == 700
