"""A Ray cluster that Gale starts is for Gale alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STARTS = """
import sys
from gale.core.cluster import joined_ray

with joined_ray("local"):
    import ray
    worker = ray._private.worker.global_worker
    print(worker.gcs_client.address, repr(worker.node.webui_url or ""), flush=True)
    sys.stdin.read()
"""
# What a stranger on the network does; Ray itself would wait for half a minute.
ASKS = """
import sys
import ray
ray.init(address=sys.argv[1], logging_level=50)
print("in")
"""


@pytest.mark.slow
def test_strangers_cannot_use_it_and_it_has_no_dashboard(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    for home in ("ours", "theirs"):
        (tmp_path / home).mkdir()
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", STARTS],
        env={**plain, "HOME": str(tmp_path / "ours")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as started:
        assert started.stdin is not None and started.stdout is not None
        address, dashboard = started.stdout.readline().split()
        assert dashboard == "''"
        for home, mode, enters in (("ours", "token", True), ("theirs", "disabled", False)):
            asked = subprocess.run(
                [sys.executable, "-c", ASKS, address],
                env={**plain, "HOME": str(tmp_path / home), "RAY_AUTH_MODE": mode},
                capture_output=True,
                text=True,
            )
            assert ("in\n" in asked.stdout) == enters, asked.stderr
        started.stdin.close()
