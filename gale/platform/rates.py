"""Rate limits as they are enforced: in memory, without a database between a request and its first token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from gale.platform.limits import Limit, LimitExceededError, Measure
from gale.platform.scopes import Scope
from gale.platform.windows import Window

MINUTE_S, DAY_S = 60.0, 24 * 3600.0
# What an answer is taken to need where its request does not say how long it may be. The rest is counted when known.
EXPECTED_ANSWER_TOKENS = 256

_Rate = Literal["requests_per_minute", "requests_per_day", "tokens_per_minute"]
_RATES: dict[_Rate, tuple[Measure, float]] = {
    "requests_per_minute": ("requests", MINUTE_S),
    "requests_per_day": ("requests", DAY_S),
    "tokens_per_minute": ("tokens", MINUTE_S),
}
_PER_REQUEST: tuple[_Rate, ...] = ("requests_per_minute", "requests_per_day")


@dataclass(frozen=True, slots=True)
class RateState:
    """The tightest limit of one measure: what it is, what is left of it, seconds until all of it is there again."""

    limit: int
    remaining: int
    reset_s: float


class Rates:
    """What all limits have been used for. From one event loop; ``clock`` is monotonic, in seconds.

    Nothing here waits, so whatever is checked still holds when it is taken. Of ``processes`` that share the limits each
    enforces its part of them.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.processes = 1
        self._clock = clock
        self._limits: dict[Scope, list[Limit]] = {}
        self._windows: dict[tuple[Scope, str, _Rate], Window] = {}
        self._running: Counter[tuple[Scope, str]] = Counter()

    def load(self, limits: Iterable[Limit], processes: int = 1) -> None:
        """Enforce ``limits`` from now on; what was used of those that stay still counts."""
        self.processes = processes
        self._limits = {}
        for limit in limits:
            self._limits.setdefault(limit.scope, []).append(limit)
        kept = {(each.scope, each.model) for scoped in self._limits.values() for each in scoped}
        self._windows = {key: window for key, window in self._windows.items() if key[:2] in kept}

    def of(self, scopes: Iterable[Scope], model: str) -> tuple[Limit, ...]:
        """The limits that hold for a request for ``model``."""
        if not self._limits:
            return ()
        return tuple(each for scope in scopes for each in self._limits.get(scope, ()) if each.model in ("", model))

    def enter(self, limits: tuple[Limit, ...], requests: int = 1) -> None:
        """Let a request run and count it, or one that has been counted go on (0 ``requests``).

        Raises :class:`LimitExceededError`, having counted nothing.
        """
        now = self._clock()
        self._check(limits, _PER_REQUEST, requests, requests, now)
        for limit in limits:
            running = self._running[limit.scope, limit.model]
            if limit.concurrency is not None and running >= self._part(limit.concurrency):
                raise LimitExceededError(
                    f"{_whose(limit)} has {running} requests in progress, and its limit is {limit.concurrency}.",
                    "requests",
                    1.0,
                )
        for limit in limits:
            self._running[limit.scope, limit.model] += 1
        for name in _PER_REQUEST:
            self._take(limits, name, requests, now)

    def leave(self, limits: tuple[Limit, ...]) -> None:
        """A request that :meth:`enter` let in has ended."""
        for limit in limits:
            key = limit.scope, limit.model
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]

    def take_tokens(self, limits: tuple[Limit, ...], prompt: int, answer: int | None) -> TokenHold:
        """Set tokens aside, ``answer`` being the most that may be written, if that is known.

        Raises :class:`LimitExceededError`, having taken nothing.
        """
        now = self._clock()
        amount = prompt + (EXPECTED_ANSWER_TOKENS if answer is None else answer)
        self._check(limits, ("tokens_per_minute",), amount, prompt if answer is None else amount, now)
        self._take(limits, "tokens_per_minute", amount, now)
        return TokenHold(self, limits, amount, now)

    def state(self, limits: tuple[Limit, ...], measure: Measure) -> RateState | None:
        """The limit of ``measure`` of which least is left; None where there is none."""
        now, states = self._clock(), []
        for limit in limits:
            for name, (measured, length_s) in _RATES.items():
                most = getattr(limit, name)
                if measured == measure and most is not None:
                    window = self._window(limit, name, length_s)
                    left = max(0, self._part(most) - window.used(now))
                    states.append(RateState(most, left, window.reset_s(now)))
        return min(states, key=lambda state: state.remaining, default=None)

    def knows(self, limit: Limit) -> bool:
        """Whether the requests of a day are counted for ``limit`` already."""
        return (limit.scope, limit.model, "requests_per_day") in self._windows

    def count_earlier(self, limit: Limit, requests: int, ago_s: float) -> None:
        """Count this server's part of ``requests`` from before the limit was there. The longest ago first."""
        self._window(limit, "requests_per_day", DAY_S).take(self._part(requests), self._clock() - ago_s)

    def _check(self, limits: tuple[Limit, ...], names: tuple[_Rate, ...], amount: int, least: int, now: float) -> None:
        """Whether ``amount`` may be taken, which could do with ``least`` if a limit is smaller than it."""
        for limit in limits:
            for name in names:
                most = getattr(limit, name)
                if most is None:
                    continue
                measure, length_s = _RATES[name]
                most = self._part(most)
                if least > most:
                    raise LimitExceededError(
                        f"This request needs {least} {measure} and {_whose(limit)} may use {most} {_per(name)}.",
                        measure,
                        None if least > 1 else length_s,
                    )
                window = self._window(limit, name, length_s)
                wait_s = window.wait_s(most - min(amount, most), now)
                if wait_s > 0:
                    raise LimitExceededError(
                        f"Rate limit reached for {_whose(limit)}: {most} {measure} {_per(name)}, of which "
                        f"{window.used(now)} are used and {amount} are asked for. Please try again in {wait_s:.0f} s.",
                        measure,
                        wait_s,
                    )

    def _take(self, limits: tuple[Limit, ...], name: _Rate, amount: int, now: float) -> None:
        for limit in limits:
            if getattr(limit, name) is not None:
                self._window(limit, name, _RATES[name][1]).take(amount, now)

    def _window(self, limit: Limit, name: _Rate, length_s: float) -> Window:
        key = limit.scope, limit.model, name
        if key not in self._windows:
            self._windows[key] = Window(length_s)
        return self._windows[key]

    def _part(self, limit: int) -> int:
        return -(-limit // self.processes)

    def _settle(self, hold: TokenHold, tokens: int) -> None:
        for limit in hold.limits:
            if limit.tokens_per_minute is None:
                continue
            window = self._window(limit, "tokens_per_minute", MINUTE_S)
            if tokens > hold.amount:
                window.take(tokens - hold.amount, self._clock())
            else:
                window.give_back(hold.amount - tokens, hold.taken_at)


@dataclass(frozen=True, slots=True)
class TokenHold:
    """Tokens set aside for one answer."""

    rates: Rates
    limits: tuple[Limit, ...]
    amount: int
    taken_at: float

    def settle(self, tokens: int) -> None:
        """Count the ``tokens`` that were used, in place of those set aside."""
        self.rates._settle(self, tokens)


def _whose(limit: Limit) -> str:
    kind, name = limit.scope
    return f"{kind} {name}" + (f" and model {limit.model}" if limit.model else "")


def _per(name: _Rate) -> str:
    return name.partition("_")[2].replace("_", " ")
