"""The time as the store keeps it."""

from __future__ import annotations

import time


def now_us() -> int:
    """Microseconds since 1970 in UTC."""
    return time.time_ns() // 1000
