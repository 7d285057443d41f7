"""How much was taken within the last minute or day, by a clock that nobody can set."""

from __future__ import annotations

from collections import deque

# A window's time in slots: what was taken leaves it a slot late at most, and never early.
_SLOTS = 60


class Window:
    """Amounts of the last ``length_s`` seconds.

    Whatever is asked of it comes with the same monotonic clock's time in seconds. In no stretch of ``length_s`` seconds
    do what was taken and not given back sum to more than :meth:`used` showed at its end.
    """

    __slots__ = ("_amounts", "_slot_s", "_used")

    def __init__(self, length_s: float) -> None:
        self._slot_s = length_s / _SLOTS
        self._amounts: deque[list[int]] = deque()  # pairs: a slot's number, what was taken in it
        self._used = 0

    def used(self, now: float) -> int:
        """What was taken lately."""
        last = self._slot(now) - _SLOTS - 1
        while self._amounts and self._amounts[0][0] <= last:
            self._used -= self._amounts.popleft()[1]
        return self._used

    def take(self, amount: int, now: float) -> None:
        """Count ``amount`` at ``now``."""
        slot = self._slot(now)
        if self._amounts and self._amounts[-1][0] >= slot:
            self._amounts[-1][1] += amount
        else:
            self._amounts.append([slot, amount])
        self._used += amount

    def give_back(self, amount: int, taken_at: float) -> None:
        """Count ``amount`` of what was taken at ``taken_at`` no more; nothing is left of it where that is long ago."""
        slot = self._slot(taken_at)
        for pair in reversed(self._amounts):
            if pair[0] <= slot:
                amount = min(amount, pair[1]) if pair[0] == slot else 0
                pair[1] -= amount
                self._used -= amount
                return

    def wait_s(self, room: int, now: float) -> float:
        """Seconds until what is used is at most ``room``; 0 if it is."""
        used = self.used(now)
        if used <= room:
            return 0.0
        for slot, amount in self._amounts:
            used -= amount
            if used <= room:
                return self._end_s(slot, now)
        return self.reset_s(now)

    def reset_s(self, now: float) -> float:
        """Seconds until nothing is used."""
        return self._end_s(self._amounts[-1][0], now) if self.used(now) else 0.0

    def _slot(self, now: float) -> int:
        return int(now // self._slot_s)

    def _end_s(self, slot: int, now: float) -> float:
        return max(0.0, (slot + _SLOTS + 1) * self._slot_s - now)
