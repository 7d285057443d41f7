"""Request bodies: read, parsed and checked against a model, with a clear 4xx for everything that is not one.

The framework's own reading answers a doubled key by taking the last one and lets NaN, NUL and half characters
through to whatever comes next, so it is done here.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from gale.server.errors import ApiError, invalid_fields

Model = TypeVar("Model", bound=BaseModel)

# Parsing this much takes about a millisecond; anything longer must not hold up everybody's streams.
_PARSE_INLINE_BYTES = 128 * 1024


async def read_json(request: Request, model: type[Model]) -> Model:
    """The body as a ``model``. Raises :class:`ApiError` 400 or 415 with ``param`` naming the field at fault."""
    _require_json(request.headers.get("content-type", ""))
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise ApiError(400, "The client left before its request was complete.", code="client_disconnected") from error
    if len(body) > _PARSE_INLINE_BYTES:
        return await asyncio.to_thread(parse_json, body, model)
    return parse_json(body, model)


def parse_json(body: bytes, model: type[Model]) -> Model:
    """See :func:`read_json`."""
    constants: list[str] = []

    def constant(name: str) -> float:
        constants.append(name)
        return float(name)

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=constant, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _invalid("it is not UTF-8") from error
    except RecursionError as error:
        raise _invalid("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} (line {error.lineno}, column {error.colno})" if body else "it is empty") from error
    except ValueError as error:
        # A doubled key, or an integer of more digits than Python agrees to convert.
        raise _invalid(str(error)) from error
    if not isinstance(value, dict):
        raise ApiError(400, "The request body must be a JSON object.", code="invalid_type")
    if b"\\u" in body:
        _check_characters(value)
    try:
        parsed = model.model_validate(value)
    except ValidationError as error:
        raise invalid_fields(error.errors(include_url=False, include_input=False)) from error
    if constants:
        # Reported after the fields, whose error is more telling where the constant stands in one we know.
        raise _invalid(f"{constants[0]} is not JSON")
    return parsed


def request_schema(model: type[BaseModel]) -> dict[str, Any]:
    """What FastAPI's ``openapi_extra`` needs to document a body that is read here."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


def _require_json(content_type: str) -> None:
    media_type, _, parameters = content_type.lower().partition(";")
    charset = parameters.partition("charset=")[2].strip(' "')
    if media_type.strip() != "application/json" or charset not in ("", "utf-8", "utf8"):
        raise ApiError(
            415, "Send JSON in UTF-8 with the header 'Content-Type: application/json'.", code="unsupported_media_type"
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        # Two readers of one body must not see two different requests.
        doubled, _ = next(pair for pair in Counter(key for key, _ in pairs).items() if pair[1] > 1)
        raise ValueError(f"the key {doubled[:64]!r} occurs twice in one object")
    return result


def _check_characters(value: Any) -> None:
    """Refuse NUL and lone surrogates anywhere; without recursion, as ``value`` may be deep."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str):
            if "\0" in item:
                raise _invalid("text must not contain the NUL character")
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                raise _invalid("text contains half of a surrogate pair") from error


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"The request body is not valid JSON: {reason}.", code="invalid_json")
