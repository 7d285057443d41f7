"""Every failure as OpenAI's error body: ``{"error": {"message", "type", "param", "code"}}``.

The official clients turn the status into an exception class, show ``message`` and let programs branch on ``code``.
They retry 408, 409, 429 and every 5xx twice, so a fault of the request must never be answered with a 5xx.
"""

from __future__ import annotations

import http
import math
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gale.core.errors import GaleError, ModelError, StoreError
from gale.engine.request import (
    ContextLengthError,
    EngineFailedError,
    EngineOverloadedError,
    SamplingError,
    UnknownAdapterError,
)
from gale.platform.access import NotAllowedError
from gale.platform.budgets import BudgetSpentError
from gale.platform.errors import (
    ConflictError,
    CursorError,
    FileTooLargeError,
    NoSpaceError,
    NotFoundError,
    StorageQuotaError,
)
from gale.platform.limits import LimitExceededError
from gale.server.not_offered import instead_of

log = structlog.get_logger("gale.server.errors")

# By what the log calls the request that is being served, for errors that tell clients no more than where to look.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_CODES = {404: "unknown_url", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer other than success. ``param`` is the path of the field at fault, such as ``messages[0].role``."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.type = type or ("invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error envelope. Lone surrogates, which JSON in UTF-8 cannot carry, become question marks."""
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": {key: value and value.encode("utf-8", "replace").decode() for key, value in fields.items()}}

    def response(self, path: str = "") -> JSONResponse:
        """The answer as HTTP, in the shape of the API that ``path`` belongs to."""
        return JSONResponse(self.body_for(path), self.status, headers=self.headers)

    def body_for(self, path: str) -> dict[str, Any]:
        """The error as the clients of the API at ``path`` read it."""
        return self.anthropic_body if path.startswith("/v1/messages") else self.body

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The error as Anthropic's clients read it."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.body["error"]["message"]}}


class AccessEndedError(Exception):
    """The caller lost their access while they were being answered; whoever streams was told."""


def invalid(param: str, reason: str) -> ApiError:
    """The error for a value that cannot be used."""
    return ApiError(400, f"Invalid '{param}': {reason}.", code="invalid_value", param=param)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about ``error``; an unforeseen one says nothing of its insides."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return ApiError(400, error.message, code="context_length_exceeded", param="messages")
        case UnknownAdapterError():  # unloaded since the request was checked
            return ApiError(404, error.message, code="model_not_found", param="model")
        case SamplingError():
            return ApiError(400, error.message, code="invalid_value", param=error.param)
        case EngineOverloadedError():
            return ApiError(503, error.message, code="engine_overloaded", headers={"Retry-After": "2"})
        case EngineFailedError():
            return ApiError(503, error.message, code="engine_failed", headers={"Retry-After": "2"})
        case NotAllowedError():
            return ApiError(403, error.message, code="permission_denied", type="permission_error")
        case LimitExceededError():
            return _limited(error)
        case BudgetSpentError():
            return ApiError(
                429,
                error.message,
                code="insufficient_quota",
                type="insufficient_quota",
                headers={"x-should-retry": "false"},
            )
        case NotFoundError():
            return ApiError(404, error.message, code="not_found")
        case CursorError():
            return ApiError(400, error.message, code="invalid_value", param=error.param)
        case ConflictError():
            # OpenAI's clients ask again after a 409, which would meet the same state.
            return ApiError(409, error.message, code="conflict", headers={"x-should-retry": "false"})
        case FileTooLargeError():
            return ApiError(413, error.message, code="file_too_large", param="file")
        case StorageQuotaError():
            return ApiError(413, error.message, code="storage_quota_exceeded", param="file")
        case NoSpaceError():
            return ApiError(507, error.message, code="no_space", headers={"x-should-retry": "false"})
        case StoreError():
            # Whose messages name folders, hosts and users, which help the operator alone.
            _log(error)
            named = "" if (known := request_id.get()) is None else f" of the request {known}"
            message = f"Gale cannot use its database at the moment; its log says more{named}."
            return ApiError(503, message, code="store_unavailable", headers={"Retry-After": "2"})
        case ModelError():
            _log(error)
            return internal_error()
        case GaleError():
            # What is left is this request's fault, such as a conversation that the model's template refuses.
            return ApiError(400, error.message, code="invalid_request")
        case HTTPException():
            phrase = http.HTTPStatus(error.status_code).phrase
            return ApiError(
                error.status_code,
                str(error.detail or phrase),
                code=_CODES.get(error.status_code),
                headers=error.headers,
            )
        case _:
            return internal_error()


def _log(error: GaleError) -> None:
    log.error("request failed", reason=error.message, hint=error.hint, request_id=request_id.get())


def too_long(error: ContextLengthError, param: str) -> ApiError:
    """What a client is told of a text that is to be read and does not fit."""
    return ApiError(
        400,
        f"This model's maximum context length is {error.context_length} tokens, and this has {error.prompt_tokens} "
        "or more.",
        code="context_length_exceeded",
        param=param,
    )


def _limited(error: LimitExceededError) -> ApiError:
    """Clients wait as long as they are told to; where waiting alone does not help they are told not to."""
    headers = {"x-should-retry": "false"}
    if error.wait_s is not None:
        headers = {"retry-after": str(math.ceil(error.wait_s)), "retry-after-ms": str(math.ceil(error.wait_s * 1000))}
    return ApiError(429, error.message, code="rate_limit_exceeded", type=error.measure, headers=headers)


def internal_error() -> ApiError:
    """A bug of ours. Asking again would meet it again, so clients are told not to."""
    return ApiError(
        500, "Gale failed to answer; its log says why.", code="internal_error", headers={"x-should-retry": "false"}
    )


def invalid_fields(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """pydantic's findings as one error about the first field at fault."""
    first = errors[0]
    param = _path(first["loc"]) + str(first.get("ctx", {}).get("path", ""))
    match first["type"]:
        case "missing":
            return ApiError(
                400, f"Missing required parameter: '{param}'.", code="missing_required_parameter", param=param
            )
        case "unsupported_parameter":
            return ApiError(400, first["msg"], code="unsupported_parameter", param=param)
        case kind:
            code = "invalid_type" if kind.endswith("_type") else "invalid_value"
            reason = str(first["msg"]).removeprefix("Value error, ")
            return ApiError(400, f"Invalid '{param}': {reason}.", code=code, param=param or None)


def _path(location: Sequence[int | str]) -> str:
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def install(app: FastAPI) -> None:
    """Answer every exception of ``app`` with the envelope; unforeseen ones are left to the edge."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response(request.scope["path"])

    async def answer_parameters(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return invalid_fields([{**each, "loc": each["loc"][1:]} for each in error.errors()]).response(
            request.scope["path"]
        )

    async def answer_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code in (404, 405):
            url = f"{request.method} {request.scope['path']}"
            detail = "Unknown request URL" if error.status_code == 404 else "Method not allowed"
            if (instead := instead_of(request.scope["path"])) is not None:
                error.status_code, detail = 404, "Gale does not offer this URL"
            hint = f" ({instead})" if instead else ""
            error = HTTPException(error.status_code, f"{detail}: {url}{hint}", headers=error.headers)
        return as_api_error(error).response(request.scope["path"])

    for kind in (ApiError, GaleError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(RequestValidationError, answer_parameters)
    app.add_exception_handler(HTTPException, answer_http)
