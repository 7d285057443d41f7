"""Rounded weights on disk, under ``GALE_HOME/quantised``: a model is rounded once, and mapped when it is opened again.

All files together have at most ``GALE_KEPT_WEIGHTS_GB``; those that were not used for longest go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from pathlib import Path

import structlog
from torch import Tensor

from gale.core.errors import GaleError, ModelError
from gale.core.settings import settings
from gale.model import kernels
from gale.model.checkpoint import weight_files
from gale.model.safetensors_file import MappedFile, write

log = structlog.get_logger()

_LAYOUT = "2"  # of packed weights; a change makes those on disk worthless


class KeptWeights:
    """What is kept of one model folder, rounded to so many bits."""

    def __init__(self, folder: Path, bits: int) -> None:
        self._path = _path(folder, bits)
        self._file: MappedFile | None = None
        with contextlib.suppress(ModelError, OSError):  # damaged, or never written
            self._file = MappedFile(self._path)
            os.utime(self._path)

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name, mapped rather than read."""
        return self._file.tensor(name) if self._file is not None and name in self._file.header else None

    def keep(self, tensors: dict[str, Tensor]) -> threading.Thread:
        """Write these in place of what is kept, in a thread, since the disk may be slow and the model is ready.

        It takes what processor time others leave. Where it cannot be done it is logged: it is only for the next start.
        """
        writing = threading.Thread(target=self._write, args=(tensors,), name="gale-kept-weights")
        writing.start()
        return writing

    def _write(self, tensors: dict[str, Tensor]) -> None:
        if sys.platform == "linux":  # elsewhere it would be the whole process
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        most = int(settings().kept_weights_gb * 1e9)
        if sum(tensor.nbytes for tensor in tensors.values()) > most:
            return
        shapes = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
        try:
            write(self._path, shapes, tensors.items())
            _tidy(self._path, most)
        except (GaleError, OSError) as error:
            log.warning("rounded_weights_not_kept", error=str(error))


def _path(folder: Path, bits: int) -> Path:
    """Files are told apart by the place, size and time of what they were made from, not by its content."""
    about = [_LAYOUT, str(bits), str(kernels.available())]
    for path in weight_files(folder):
        status = path.stat()
        about += [str(path.resolve()), str(status.st_size), str(status.st_mtime_ns)]
    key = hashlib.sha256("\n".join(about).encode()).hexdigest()[:24]
    return settings().home / "quantised" / f"{key}.safetensors"


def _tidy(newest: Path, most: int) -> None:
    """Remove what was not used for longest until ``most`` bytes are left; who has it mapped keeps it until then."""
    files = {path: path.stat() for path in newest.parent.glob("*.safetensors")}
    total = sum(status.st_size for status in files.values())
    for path, status in sorted(files.items(), key=lambda item: item[1].st_mtime_ns):
        if total <= most:
            return
        if path != newest:
            path.unlink(missing_ok=True)
            total -= status.st_size
