"""Where the time of a trial goes."""

import pytest

from workloads_smoke.profiling import Profiler


def test_the_profiler_adds_up_what_it_is_shown() -> None:
    profiler = Profiler()
    for _ in range(3):
        with profiler.profile("Data selection"):
            pass
    with pytest.raises(ZeroDivisionError), profiler.profile("Evaluation"):
        raise ZeroDivisionError
    header, *lines = profiler.summary().splitlines()
    assert header.split() == ["action", "calls", "mean", "s", "total", "s", "share"]
    assert {line[:24].strip(): int(line[24:32]) for line in lines} == {
        "Data selection": 3,
        "Evaluation": 1,
    }
