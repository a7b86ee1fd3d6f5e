"""kill -9 of the daemon at every named point: nothing acknowledged is lost, and no hand is needed."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from crashload import play

pytestmark = pytest.mark.slow

LEAST_POINTS = 60
TOGETHER = 2 * (os.cpu_count() or 1)


@pytest.fixture(scope="module")
def points(strict, tmp_path_factory):
    """Every point that the workload passes when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("discover")
    assert play(folder, strict.url, "") == ""
    return (folder / "points").read_text().split()


def test_there_are_enough_points(points):
    """Before and after each commit, each tool, each model call, each file that is adopted."""
    print(f"{len(points)} named points: {' '.join(sorted(points))}")
    assert len(points) >= LEAST_POINTS
    alone = {
        point
        for point in points
        if point.endswith(".before") and point.replace(".before", ".after") not in points
    }
    assert alone == set()


def test_a_crash_at_any_point_loses_nothing(points, strict, tmp_path_factory):
    """The same ending, whichever point it is; every conversation is accepted."""
    strict.reset()

    def one(point):
        return point, play(tmp_path_factory.mktemp(point), strict.url, point)

    with ThreadPoolExecutor(TOGETHER) as pool:
        wrong = {point: text for point, text in pool.map(one, points) if text}
    print(f"{len(points)} named points, {len(wrong)} of them with losses")
    assert not wrong, "\n\n".join(f"{point}: {text}" for point, text in wrong.items())
    assert strict.refusals() == []
