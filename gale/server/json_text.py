"""JSON as our streams carry it: one line, as short as it gets, characters as they are."""

from __future__ import annotations

import json
from typing import Any


def to_json(value: Any) -> str:
    """``value`` on one line. Raises ``ValueError`` for NaN and infinity, which JSON does not have."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
