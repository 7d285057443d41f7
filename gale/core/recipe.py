"""Recipes: TOML files read into typed, documented settings, with every problem reported at once."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from gale.core import files
from gale.core.errors import GaleError, RecipeError


class _FromShell(str):
    """Text of an override, which was typed in a shell and so counts paths from the working directory."""

    __slots__ = ()


class Recipe(BaseModel):
    """Base of every recipe: unknown keys are refused, values are not silently converted, files are found.

    A relative path in a recipe is relative to the recipe's own folder, so a recipe works from anywhere; one in an
    override is relative to the working directory.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _resolve_paths(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name].annotation if info.field_name else None
        several = isinstance(value, list) and str(annotation).startswith("tuple[")
        if annotation is Path or Path in get_args(annotation):
            folder = (info.context or {}).get("folder")
            try:
                if isinstance(value, str):
                    return _located(value, folder)
                if several:
                    return tuple(_located(each, folder) if isinstance(each, str) else each for each in value)
            except GaleError as error:
                raise ValueError(error.message) from error
        if several:
            return tuple(value)  # TOML has arrays only; strict mode would refuse them for tuples
        return value


def _located(value: str, folder: Path | None) -> Path:
    """A path as written in a recipe of ``folder``, or in an override."""
    return files.resolve(value, None if isinstance(value, _FromShell) else folder)


RecipeType = TypeVar("RecipeType", bound=Recipe)
Completion = Callable[[dict[str, Any], Callable[[str], Path]], None]


def load_recipe(
    path: Path, kind: type[RecipeType], overrides: Sequence[str] = (), *, complete: Completion | None = None
) -> RecipeType:
    """Read ``path`` as a ``kind``, with ``key=value`` overrides (dotted keys, TOML values; bare words are strings).

    Relative paths in overrides are resolved against the working directory. ``complete`` may add to the content before
    it is checked; it is handed what finds the files that the content names.
    Raises :class:`RecipeError` naming every unknown key (with the nearest valid name) and every wrong value.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"There is no recipe {path}.", []) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}", []) from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"The recipe {path} is not valid TOML: {error}", []) from error
    problems = [problem for override in overrides if (problem := _apply(content, override))]
    folder = path.resolve().parent
    if complete and not problems:
        complete(content, lambda value: _located(value, folder))
    try:
        recipe = kind.model_validate(content, context={"folder": folder})
    except ValidationError as error:
        details = error.errors()
        # A list whose items are all wrong is also called too short, which would mislead.
        beneath = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
        problems += [
            _explain(dict(detail), kind)
            for detail in details
            if not (detail["type"] == "too_short" and detail["loc"] in beneath)
        ]
    if problems:
        raise RecipeError(f"The recipe {path} cannot be used:", problems)
    return recipe


def _apply(content: dict[str, Any], override: str) -> str | None:
    """Set one ``key=value`` in ``content``; returns what is wrong with it, if anything."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        return f"override {override!r}: write key=value"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for name in names[:-1]:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            return f"override {override!r}: {name} is not a table"
    content[names[-1]] = _typed(value)
    return None


def _typed(value: Any) -> Any:
    if isinstance(value, str):
        return _FromShell(value)
    if isinstance(value, list):
        return [_typed(item) for item in value]
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    return value


def _explain(detail: dict[str, Any], kind: type[BaseModel]) -> str:
    location = [part for part in detail["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    where = ".".join(str(part + 1) if isinstance(part, int) else part for part in location)
    if detail["type"] == "extra_forbidden":
        names = _field_names(kind, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), names, n=1)
        return f"{where}: no such key" + (
            f"; did you mean {near[0]!r}?" if near else f" (valid: {', '.join(sorted(names))})"
        )
    if detail["type"] == "missing":
        return f"{where}: required, but missing"
    if detail["type"] == "value_error":  # raised by a recipe's own check, whose message says it all
        message = str(detail["ctx"]["error"])
        return f"{where}: {message}" if where else message
    message = str(detail["msg"])
    message = message[0].lower() + message[1:]
    return f"{where}: {message}, not {detail['input']!r}" if where else message


def _field_names(kind: Any, location: Sequence[str | int]) -> list[str]:
    """Names valid at ``location`` below ``kind``, looking through lists, tuples, optionals and tagged unions."""
    for part in location:
        if isinstance(part, str) and (tagged := _tagged(kind, part)):
            kind = tagged
        elif isinstance(part, str):
            field = kind.model_fields.get(part) if hasattr(kind, "model_fields") else None
            if field is None:
                return []
            kind = field.annotation
        while not _is_recipe(kind) and get_args(kind) and len(list(filter(_is_recipe, _members(kind)))) < 2:
            kind = next(filter(_is_recipe, get_args(kind)), get_args(kind)[0])
    return list(kind.model_fields) if hasattr(kind, "model_fields") else []


def _is_recipe(kind: Any) -> bool:
    return hasattr(kind, "model_fields")


def _members(kind: Any) -> list[Any]:
    """The choices of a union, without what is annotated to them."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) not in (Union, UnionType):
        return []
    return [get_args(choice)[0] if get_origin(choice) is Annotated else choice for choice in get_args(kind)]


def _tagged(kind: Any, tag: str) -> Any:
    """The member of a tagged union that has ``tag`` as one of its literal values."""
    for member in _members(kind):
        if _is_recipe(member) and any(tag in get_args(field.annotation) for field in member.model_fields.values()):
            return member
    return None
