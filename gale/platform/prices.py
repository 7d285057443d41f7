"""What tokens cost, in whole micro-units of whatever currency an operator counts in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, insert, select

from gale.engine.request import Usage
from gale.platform import tables

_PRICED_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """Micro-units for a million tokens: of prompts, of what of them was known from earlier ones, and of answers."""

    input_micro: int = 0
    cached_input_micro: int = 0
    output_micro: int = 0

    def cost(self, usage: Usage) -> int:
        """Micro-units for ``usage``, rounded up."""
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        total = (
            (usage.prompt_tokens - cached) * self.input_micro
            + cached * self.cached_input_micro
            + usage.completion_tokens * self.output_micro
        )
        return -(-total // _PRICED_TOKENS)

    def most(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Micro-units that so many tokens cost at most, however many of the prompt's are known."""
        dearest = max(self.input_micro, self.cached_input_micro)
        return -(-(prompt_tokens * dearest + completion_tokens * self.output_micro) // _PRICED_TOKENS)


FREE = Price()


def read_prices(connection: Connection) -> dict[str, Price]:
    """All prices by model; "" is the price of every model that has none of its own."""
    rows = connection.execute(select(tables.prices))
    return {row.model: Price(row.input_micro, row.cached_input_micro, row.output_micro) for row in rows}


def set_price(connection: Connection, model: str, price: Price | None) -> None:
    """Set what ``model`` costs from now on; None forgets it."""
    table = tables.prices
    connection.execute(delete(table).where(table.c.model == model))
    if price is not None:
        connection.execute(insert(table).values(model=model, **asdict(price)))


def price_of(prices: Mapping[str, Price], model: str, base: str) -> Price:
    """What ``model``, an adapter over ``base`` or that itself, costs."""
    return prices.get(model) or prices.get(base) or prices.get("") or FREE
