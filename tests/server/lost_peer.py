"""Run as a program in a network of its own: two clients are answered, then nothing passes any more.

Prints ``given up`` when the server has noticed. See test_connections.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from gale.platform.store import Store
from gale.server import http1
from tests.server.live import begin, eventually, start


def main() -> None:
    """Pull the cable."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    http1.LOST_TIMEOUT_S, http1._PROBE_AFTER_S = 2, 1
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(f"sqlite:///{Path(folder) / 'gale.db'}", files=Path(folder) / "files")
        live = start(store)
        socks = [
            begin(live, "/v1/chat/completions", {**HELLO, "stream": stream, "messages": [{**ASK, "content": content}]})
            for stream, content in ((True, "endless"), (False, "silent"))
        ]
        eventually(lambda: live.engine.active == len(socks))
        subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
        eventually(lambda: live.engine.active == 0)
        print("given up", flush=True)
        live.stop()
        store.close()


ASK = {"role": "user"}
HELLO = {"model": "scripted/one"}

if __name__ == "__main__":
    main()
