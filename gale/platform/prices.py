"""What tokens cost, in whole micro-units of whatever currency an operator counts in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select

from gale.engine.request import Usage
from gale.platform import tables
from gale.platform.database import Database

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


class Prices:
    """The prices of one database; "" is the price of every model that has none of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> dict[str, Price]:
        """The prices by model."""
        return await self._database.read(read_prices)

    async def set(self, model: str, price: Price | None) -> None:
        """Set what ``model`` costs; None forgets it."""
        table = tables.prices

        def work(connection: Connection) -> None:
            connection.execute(delete(table).where(table.c.model == model))
            if price is not None:
                connection.execute(
                    insert(table).values(
                        model=model,
                        input_micro=price.input_micro,
                        cached_input_micro=price.cached_input_micro,
                        output_micro=price.output_micro,
                    )
                )

        await self._database.write(work)


def read_prices(connection: Connection) -> dict[str, Price]:
    """All prices by model."""
    rows = connection.execute(select(tables.prices))
    return {row.model: Price(row.input_micro, row.cached_input_micro, row.output_micro) for row in rows}


def price_of(prices: Mapping[str, Price], model: str, base: str) -> Price:
    """What ``model``, an adapter over ``base`` or that itself, costs."""
    return prices.get(model) or prices.get(base) or prices.get("") or FREE
