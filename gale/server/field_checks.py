"""Checks of fields that several bodies share."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

INT64 = 2**63


class Body(BaseModel):
    """Base of what stands inside a body: strict, other fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


def at_most(count: int) -> BeforeValidator:
    """Refuses longer lists and objects before looking into them: describing each wrong item would cost seconds."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > count:
            raise ValueError(f"must have at most {count} items")
        return value

    return BeforeValidator(check)


def stop_list(stop: Any) -> Any:
    """One stop string, or null for none, as a list."""
    return [] if stop is None else [stop] if isinstance(stop, str) else stop
