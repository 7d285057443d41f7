"""Stop strings: text is let through only when it can no longer be the beginning of one."""

from __future__ import annotations


class StopScanner:
    """Watches an answer's text for ``stops``, wherever the pieces happen to be cut."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.met: str | None = None  # the stop string that was met

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self.met is not None

    def push(self, text: str) -> str:
        """Text that may be shown now. After a stop string was met, :attr:`stopped` is true and nothing more comes."""
        self._held += text
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            place, self.met = min(found)
            shown, self._held = self._held[:place], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, once it is sure that nothing follows."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins ``stop``."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
