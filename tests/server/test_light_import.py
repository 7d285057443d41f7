"""What is wrong with a port or a database is said at once, which takes an application that does not wait for torch."""

from __future__ import annotations

import subprocess
import sys


def test_the_application_is_imported_without_torch() -> None:
    heavy = ("torch", "transformers", "ray", "pyarrow")
    program = f"import sys, gale.server.app; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "[]\n"
