"""Structured logs: coloured lines on a terminal, JSON lines elsewhere. Logs go to stderr, results to stdout."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any

import structlog

from gale.core.printable import printable

_tracebacks = structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))


def configure_logging(level: str = "INFO") -> None:
    """Set up structlog for the process; call once, from the command line."""
    numeric = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[structlog.types.Processor] = (
        # Tracebacks without local variables, which may hold what people wrote.
        [
            structlog.processors.format_exc_info,
            _harmless,
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
        ]
        if sys.stderr.isatty()
        else [_tracebacks, _harmless, structlog.processors.JSONRenderer(ensure_ascii=False)]
    )
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        # Asked for at each line and not once: stderr may be another one by then (a test's, a daemon's).
        logger_factory=lambda *_: _Stderr(),
        cache_logger_on_first_use=False,
    )


class _Stderr:
    """Writes lines to stderr. Where that cannot be written (a full disk) they are lost, and the work goes on."""

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)

    log = debug = info = warning = error = critical = exception = msg


def _harmless(_: object, __: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    """Lines quote what comes from anywhere; none of it may command the terminal that shows them."""
    return {key: _without_commands(value) for key, value in event.items()}


def _without_commands(value: Any) -> Any:
    match value:
        case str():
            return printable(value)
        case dict():
            return {key: _without_commands(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_commands(item) for item in value]
        case _:
            return value
