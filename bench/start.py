"""Seconds from `make run` to an answering server, once everything is installed and built.

    .venv/bin/python bench/start.py

Prints each of three starts; the first may read from a cold disk cache.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time


def main() -> None:
    """Start, wait for the line with the address, stop; three times."""
    for _ in range(3):
        with tempfile.TemporaryDirectory() as home:
            began = time.perf_counter()
            process = subprocess.Popen(
                ["make", "run", "ARGS=--port 0"],
                env={**os.environ, "GALE_HOME": home},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            assert process.stdout is not None
            line = next((line for line in process.stdout if "ready at" in line), "it did not start")
            print(f"{time.perf_counter() - began:.1f} s: {line.strip()}")
            os.killpg(process.pid, signal.SIGINT)
            process.wait()


if __name__ == "__main__":
    main()
