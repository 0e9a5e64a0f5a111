"""Whether updates take as long as they did: on a card that others use too they may suddenly take ten times as
long, and nothing else would say so.
"""

from __future__ import annotations

import statistics
from collections import deque

TIMES = 4.0
"""So many times as long is worth a word; out of memory, half the pictures at once cost less than that."""

_USUAL, _LEAST, _RECENT = 50, 10, 5


class Pace:
    """The times of updates; the median of the last few is held against that of those before."""

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=_USUAL)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._is_slow = False

    def note(self, seconds: float) -> str | None:
        """To be told of each update; a sentence where they have become slow, once until they recover."""
        self._recent.append(seconds)
        if len(self._usual) < _LEAST:
            self._usual.append(seconds)
            return None
        now, before = statistics.median(self._recent), statistics.median(self._usual)
        if now <= TIMES * before:
            self._usual.append(seconds)
            self._is_slow = False
            return None
        if self._is_slow:
            return None
        self._is_slow = True
        return (
            f"an update takes {now:.3g} s now, {now / before:.0f} times as long as before; another program "
            "may be using this machine, or the card's memory has spilled into the system's: close what you "
            "can, the run goes on"
        )
