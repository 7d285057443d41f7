"""One request on its way to the engine: let in, given what it may use, and settled when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gale.core.errors import StoreError
from gale.engine.request import Usage
from gale.platform.access import Actor, NotAllowedError, authorize
from gale.platform.budgets import BudgetKey
from gale.platform.ids import new_id
from gale.platform.limits import Limit, Measure
from gale.platform.prices import Price
from gale.platform.purses import Reservation
from gale.platform.rates import RateState, TokenHold
from gale.platform.scopes import scopes_of
from gale.platform.usage import UsageEvent

if TYPE_CHECKING:
    from gale.platform.metering import Metering


class UsageNotKeptError(StoreError):
    """So much usage waits to be written that nothing that costs somebody's budget is begun."""


class Admission:
    """One request of ``actor``.

    It may ask the engine several times, such as for several choices or documents: it counts once against limits of
    requests, a prompt that its answers share is charged once, and all makes one usage event.
    """

    def __init__(
        self,
        metering: Metering,
        actor: Actor,
        *,
        base: str,
        longest: int,
        kind: str | None,
        batch: bool,
        request_id: str | None,
    ) -> None:
        self.actor = actor
        self.kind = kind
        self._metering = metering
        self._base = base
        self._longest = longest
        self._batch = batch
        self._request_id = request_id
        self._project = actor.project
        self._scopes = scopes_of(actor)
        self._limits: tuple[Limit, ...] | None = None
        self._asking = 0
        self._counted = False
        self._prompts: dict[tuple[int, int], object] = {}
        self._counts: dict[tuple[int, int], int] = {}
        self._counting = asyncio.Lock()
        self._event: UsageEvent | None = None

    def may_use(self, model: str) -> bool:
        """Whether its actor may know of ``model``."""
        return self.actor.may_use(model) and self._metering.visible(self.actor, model)

    def state(self, measure: Measure) -> RateState | None:
        """The tightest limit that held for it; None where there is none."""
        return self._metering.rates.state(self._limits or (), measure)

    async def begin(
        self, model: str | None, kind: str, prompt: object, count: Callable[[], int], answer: int | None
    ) -> Ticket:
        """Let one question to the engine pass: of ``model`` (None: the base), ``answer`` tokens long at most (None: as
        many as the context leaves).

        ``count`` counts the tokens of ``prompt`` in a thread, where they matter. A ``prompt`` of None
        is shared with no other answer, and counted already.

        Raises :class:`LimitExceededError`, :class:`BudgetSpentError`, :class:`NotAllowedError`, :class:`StoreError`.
        """
        model = model or self._base
        authorize(self.actor, "use")
        if not self.may_use(model):
            raise NotAllowedError(f"The model `{model}` may not be used here.")
        key = _key(prompt)
        shared = key in self._prompts
        if prompt is not None:
            self._prompts[key] = prompt  # kept, so that its identity stays its own
        metering = self._metering
        await metering.ready()
        self._enter(model)
        hold: TokenHold | None = None
        try:
            price = metering.price(model, self._base)
            budgets = metering.purses.keys_of(self._scopes)
            if budgets and metering.queue.full:
                raise UsageNotKeptError("Usage cannot be written at the moment; try again later.")
            tokens = None
            limits = self._limits or ()
            limited = any(limit.tokens_per_minute is not None for limit in limits)
            if limited or budgets:
                tokens = count() if prompt is None else await self._count(key, count)
            charged = 0 if shared else tokens or 0
            if limited:
                hold = metering.rates.take_tokens(limits, charged, answer)
            longest = max(0, self._longest - (tokens or 0)) if answer is None else answer
            most = price.most(charged, longest) if budgets else 0
            reservation = await metering.purses.reserve(budgets, most)
        except BaseException:
            if hold is not None:
                hold.settle(0)
            self._leave()
            raise
        return Ticket(self, model, self.kind or kind, price, tokens, shared, hold, reservation)

    def end(self, ticket: Ticket, usage: Usage) -> None:
        """Count what ``ticket`` used and give back the rest."""
        self._leave()
        if ticket.hold is not None:
            ticket.hold.settle(usage.prompt_tokens + usage.completion_tokens)
        cost = ticket.price.cost(usage)
        self._write(ticket.model, ticket.kind, usage, cost, ticket.reservation.settle(cost))

    def _write(self, model: str, kind: str, usage: Usage, cost: int, spent: Mapping[BudgetKey, int]) -> None:
        if not usage.prompt_tokens and not usage.completion_tokens:
            return
        event = UsageEvent(
            id=new_id("usage"),
            created_at=self._metering.now_us(),
            organisation_id=self.actor.organisation_id,
            project_id=self._project,
            user_id=self.actor.user_id,
            api_key_id=self.actor.key_id,
            model=model,
            kind=kind,
            batch=int(self._batch),
            requests=int(self._event is None),
            input_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.completion_tokens,
            cost_micro=cost,
            request_id=self._request_id,
        )
        self._event = self._metering.queue.add(event, spent, self._event)
        self._metering.watch.used(kind, usage)

    def _enter(self, model: str) -> None:
        if self._batch:
            return
        if self._limits is None:
            self._limits = self._metering.rates.of(self._scopes, model)
        if not self._asking:
            self._metering.rates.enter(self._limits, requests=int(not self._counted))
            self._counted = True
        self._asking += 1

    def _leave(self) -> None:
        if self._batch:
            return
        self._asking -= 1
        if not self._asking:
            self._metering.rates.leave(self._limits or ())

    async def _count(self, key: tuple[int, int], count: Callable[[], int]) -> int:
        async with self._counting:
            if key not in self._counts:
                self._counts[key] = await asyncio.to_thread(count)
            return self._counts[key]


class Ticket:
    """One question that was let pass. End it exactly once."""

    __slots__ = ("_admission", "hold", "kind", "model", "price", "prompt_tokens", "reservation", "shared")

    def __init__(
        self,
        admission: Admission,
        model: str,
        kind: str,
        price: Price,
        prompt_tokens: int | None,
        shared: bool,
        hold: TokenHold | None,
        reservation: Reservation,
    ) -> None:
        self._admission = admission
        self.model = model
        self.kind = kind
        self.price = price
        self.prompt_tokens = prompt_tokens
        self.shared = shared
        self.hold = hold
        self.reservation = reservation

    def end(self, usage: Usage | None) -> None:
        """What was used, None for nothing; a prompt that another answer is charged for is left out."""
        usage = usage or Usage(0, 0)
        if self.shared:
            usage = Usage(0, usage.completion_tokens)
        self._admission.end(self, usage)


def _key(prompt: object) -> tuple[int, int]:
    """Which prompt it is; one that grew between two answers is another."""
    return id(prompt), len(prompt) if isinstance(prompt, list) else 0
