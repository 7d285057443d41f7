"""What the operating system allows a process that serves."""

from __future__ import annotations

import contextlib
import resource

MOST_FILES = 65_536


def prepare_process() -> None:
    """Allow as many open files as may be, since every connection is one; and no core dump.

    A dump would write people's conversations and keys to the disk.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # a system may allow fewer than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
