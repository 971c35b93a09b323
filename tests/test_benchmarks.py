"""The short form of benchmarks/speed.py, with loose limits: a regression fails."""

import pytest

from benchmarks.speed import KEEPS, epoch_cost, ratio, step_loops


def _median_ratio(measure, base: str, rounds: int, limit: float) -> float:
    """The ratio of `this` to the base; once more if it is over the limit, for a machine that was busy."""
    for _ in range(2):
        rounds_of = {name: [] for name in (base, "this")}
        for _ in range(rounds):
            for name, values in rounds_of.items():
                values.append(measure(name))
        found = ratio(rounds_of["this"], rounds_of[base])
        if found <= limit:
            break
    return found


@pytest.mark.slow
@pytest.mark.alone
def test_an_epoch_costs_what_a_bare_loop_costs(tmp_path):
    assert _median_ratio(lambda name: epoch_cost(name, 3840, tmp_path)[0], "bare", rounds=5, limit=1.15) <= 1.15


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.usefixtures("main")  # which puts back the signal handlers that a run in this process leaves
def test_a_step_costs_what_a_bare_loop_costs(tmp_path):
    loops = step_loops(128, 128, 1000, tmp_path)
    assert _median_ratio(lambda name: loops[name](), KEEPS, rounds=7, limit=1.20) <= 1.20
