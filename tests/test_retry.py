"""When a failed call is made again, and how long that takes."""

import pytest

from llmprocd.abi.errno import Errno
from llmprocd.model.protocol import ModelError
from llmprocd.retry import FARTHEST, LONGEST, Retries, final, heeded

POLICY = Retries(8, 300.0)


def failed(*, again=True, retry_after=None, shared=False):
    return ModelError(Errno.EIO, "it broke", again=again, retry_after=retry_after, shared=shared)


def test_the_pause_doubles_until_a_minute():
    pauses = [POLICY.pause(failed(), attempt, 0, 1.0) for attempt in range(1, 9)]
    assert pauses == [1, 2, 4, 8, 16, 32, LONGEST, LONGEST]


def test_chance_takes_up_to_a_quarter_of_a_pause():
    """So that each is longer than the one before, whatever chance says."""
    assert [POLICY.pause(failed(), 3, 0, chance) for chance in (0.0, 0.5, 1.0)] == [3, 3.5, 4]


def test_what_cannot_pass_is_not_tried_again():
    assert POLICY.pause(failed(again=False, retry_after=1), 1, 0, 0.5) is None


def test_after_eight_retries_it_is_final():
    assert POLICY.pause(failed(), 8, 0, 0.5) is not None
    assert POLICY.pause(failed(), 9, 0, 0.5) is None


def test_after_five_minutes_it_is_final():
    assert POLICY.pause(failed(), 2, 299, 0.5) is not None
    assert POLICY.pause(failed(), 2, 301, 0.5) is None


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_a_time_that_the_server_named_is_never_undercut(chance):
    """A call that waits alone comes a little later; what holds a whole endpoint is spread out there."""
    assert 12 <= POLICY.pause(failed(retry_after=12), 1, 0, chance) <= 13
    assert POLICY.pause(failed(retry_after=12, shared=True), 1, 0, chance) == 12
    assert POLICY.pause(failed(retry_after=0), 1, 0, chance) == 0


def test_a_server_that_wants_hours_has_refused():
    assert POLICY.pause(failed(retry_after=FARTHEST), 1, 0, 0.5) is not None
    assert POLICY.pause(failed(retry_after=FARTHEST + 1, shared=True), 1, 0, 0.5) is None


def test_a_named_time_holds_the_endpoint_after_the_last_attempt_too():
    assert heeded(failed(retry_after=12)) == 12
    assert heeded(failed()) == 0
    assert heeded(failed(retry_after=FARTHEST + 1)) == 0, "each finds out by itself that it is refused"


def test_no_retries_are_no_retries():
    assert Retries(0, 300.0).pause(failed(), 1, 0, 0.5) is None


def test_a_final_failure_tells_how_often_it_was_tried():
    assert final(failed(), 1).text == "it broke"
    told = final(failed(), 9)
    assert (told.errno, told.text) == (Errno.EIO, "it broke (asked 9 times)")
