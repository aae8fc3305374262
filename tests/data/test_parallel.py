"""Work on several threads: in order, in bounds, and over when its caller is."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest

from waveletgpt.data import parallel


@pytest.fixture(autouse=True, params=[1, 3])
def _cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "cores", lambda: request.param)


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("waveletgpt-data")]


def test_results_come_in_order_and_few_are_held() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        while taken < 50:
            taken += 1
            yield taken

    def work(item: int) -> int:
        time.sleep(random.Random(item).random() / 500)
        return -item

    found = []
    for item, result in parallel.in_order(work, items()):
        found.append((item, result))
        assert taken - item < 2 * parallel.cores()
    assert found == [(item, -item) for item in range(1, 51)]
    assert not own_threads()


def test_an_error_comes_at_its_place_and_ends_the_work() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 5:
            raise ValueError("five")
        return item

    results = parallel.in_order(work, iter(range(1000)))
    assert [next(results)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)
    assert len(begun) <= 5 + 2 * parallel.cores()
    assert not own_threads()


def test_items_that_fail_and_a_caller_that_stops_leave_no_thread() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(parallel.in_order(str, items()))
    assert not own_threads()
    few = parallel.in_order(str, iter(range(1000)))
    assert next(few) == (0, "0")
    few.close()  # type: ignore[attr-defined]
    assert not own_threads()


def test_nothing_is_nothing() -> None:
    assert [*parallel.in_order(str, [])] == []
    assert [*parallel.batches([], 5)] == []
