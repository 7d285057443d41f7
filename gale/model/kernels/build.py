"""Building the kernels with the system's C++ compiler: once, by `make run` or whoever needs them first."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import structlog

from gale.core.settings import settings

log = structlog.get_logger()

_HERE = Path(__file__).parent
_KEPT_S = 90 * 86400.0
_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-pthread"]
# What lets the compiler vectorise; sums that must come out the same everywhere are written with instructions of their
# own, which this leaves as they are.
_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"]


def library() -> tuple[Path | None, str]:
    """The built library, made now if need be; or None and why there is none."""
    sources = sorted([*_HERE.glob("*.cpp"), *_HERE.glob("*.h")])
    content = hashlib.sha256(" ".join(_FLAGS).encode())
    for source in sources:
        content.update(source.read_bytes())
    name = f"kernels-{content.hexdigest()[:16]}-{os.uname().machine}.so"
    folder = settings().home / "kernels"
    if (folder / name).is_file():
        return folder / name, ""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if compiler is None:
        return None, "there is no C++ compiler (g++ or clang++)"
    log.info("building_native_kernels", compiler=compiler)  # some seconds, once
    command = [compiler, *_FLAGS, *(str(source) for source in sources if source.suffix == ".cpp")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, timeout=300)  # noqa: S603
            if done.returncode:
                return None, f"{compiler} failed: {(done.stderr.strip().splitlines() or ['without a word'])[0]}"
            made.replace(folder / name)  # whole or not at all: another process may look for it now
    except (OSError, subprocess.SubprocessError) as error:
        return None, str(error)
    for old in folder.glob("kernels-*.so"):  # of other versions, which may still be in use beside this one
        with contextlib.suppress(OSError):
            if old.name != name and old.stat().st_mtime < time.time() - _KEPT_S:
                old.unlink()
    return folder / name, ""
