"""Workers that end before their work does."""

import os
import signal
from collections.abc import Iterator

import pytest

from shards.storage.errors import Failed
from shards.storage.workers import each


def killed_at(number: int, last: int) -> int:
    if number == last:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is short
    return number


@pytest.mark.parametrize("last", [0, 5, 30])
def test_a_killed_worker_is_reported_with_its_work_and_the_remedy(last: int) -> None:
    def jobs() -> Iterator[tuple[int, int]]:
        yield from ((number, last) for number in range(31))

    message = (
        r"^packing: one of 2 processes was killed, .* memory .* same command goes on, .*--workers"
    )
    with pytest.raises(Failed, match=message):
        list(each(killed_at, jobs(), 2, "packing"))


def test_what_a_worker_raises_is_raised_here() -> None:
    with pytest.raises(TypeError):
        list(each(killed_at, [(1, 2), (1,)], 2))
