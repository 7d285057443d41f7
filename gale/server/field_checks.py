"""Checks of fields that several bodies share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

INT64 = 2**63
# Parameters, each with the values that ask for nothing and are taken; null is always one of them.
Refused = Mapping[str, tuple[Any, ...]]


class Parameters(BaseModel):
    """Base of a whole body. A field that nobody knows is ignored.

    One of ``unsupported``, which other servers have and this one not, is refused: an answer that silently lacks what
    was asked for is worse than an error. ``advice`` says what to do instead.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    unsupported: ClassVar[Refused] = {}
    advice: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            harmless = self.unsupported.get(name)
            if harmless is None or value is None:
                continue
            # By type as well: True equals 1 in Python and is no number in JSON.
            if not any(type(value) is type(allowed) and value == allowed for allowed in harmless):
                message = f"The parameter '{name}' with this value is not supported. {self.advice.get(name, '')}"
                context = {"path": name, "message": message.strip()}
                raise PydanticCustomError("unsupported_parameter", "{message}", context)
        return self


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
