"""Why a model stopped, and what follows from it.

Law: every stop reason has an effect, and all effects are in this table. Tools are run for `tool_use` alone; a
word that nobody knows yet ends the run, as `end_turn` does, and is shown as it came.
"""

import msgspec


class Stop(msgspec.Struct, frozen=True):
    """What a stop reason does to the run."""

    runs_tools: bool = False  # the calls in the answer are run
    goes_on: bool = False  # the answer is sent back as it is, and the model asked again
    verdict: int = 0  # the exit status, if this was the last run
    fault: str = ""  # errno and sentence, when it is a failure


STOPS = {
    "end_turn": Stop(),
    "tool_use": Stop(runs_tools=True),
    "max_tokens": Stop(),
    "stop_sequence": Stop(),
    "pause_turn": Stop(goes_on=True),
    "compaction": Stop(goes_on=True),
    "refusal": Stop(),
    "model_context_window_exceeded": Stop(
        verdict=1,
        fault="E2BIG: the answer was cut off, the context window is full: goto an earlier message to go on",
    ),
}


def of(reason: str) -> Stop:
    """The effect of a stop reason."""
    return STOPS.get(reason, STOPS["end_turn"])
