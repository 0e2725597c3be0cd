"""Every collective of a training step, as the profiler saw it, is one of docs/design/scale.md's."""

from collections import Counter

import pytest

from benchmarks.scaling import BATCH, TrainingStep, collectives, predicted


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 4])
def test_calls_and_bytes_are_those_of_the_formula(world: int) -> None:
    step = TrainingStep(0, 1)
    width, bytes_predicted = step.encoder.width, predicted(step, world)
    seen = Counter(collectives(world))
    head = Counter({
        ("all_gather", BATCH // world * (width + 2)): 1,
        ("all_reduce", 2 * BATCH): 1,
        ("all_reduce", BATCH * width): 1,  # the reduce-scatter, over gloo
        ("all_reduce", 1): 1,
    })  # fmt: skip
    neck = Counter({("all_reduce", 2 * width): 2, ("all_reduce", width): 2})
    assert not head + neck - seen
    buckets = seen - head - neck
    assert {name for name, _ in buckets} == {"all_reduce"}
    assert sum(numbers * calls for (_, numbers), calls in buckets.items()) == step.parameters()
    assert bytes_predicted["encoder"] == 4 * step.parameters()
    doubles = 8 * (2 * BATCH + 1)
    assert bytes_predicted["head"] == 4 * BATCH * (width + 2) + 4 * BATCH * width + doubles
    assert bytes_predicted["neck"] == 4 * 6 * width
