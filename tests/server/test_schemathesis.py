"""schemathesis reads our own OpenAPI document and sends what it finds there, valid and not: nothing answers with 5xx.

Whatever fails carries OpenAI's error envelope (Anthropic's for its own routes).
"""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.server.live import Live

EXAMPLES = 12


@pytest.mark.slow
def test_nothing_answers_with_a_server_error(tiny: Live) -> None:
    schema = schemathesis.openapi.from_url(f"{tiny.url}/openapi.json")
    operations = [each.ok() for each in schema.get_all_operations()]
    assert len(operations) > 20
    for operation in operations:

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def send(case: Any) -> None:
            response = case.call(timeout=60)
            assert response.status_code < 500, f"{case.operation.label}: {response.text[:500]}"
            if response.status_code >= 400:
                assert response.json()["error"]["message"]

        send()
