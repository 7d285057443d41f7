"""Build the kernels now, and say whether they can be had: what `make run` does before it serves."""

from gale.model.kernels.build import library

path, reason = library()
print(f"Native kernels: {path}" if path else f"No native kernels ({reason}); torch serves instead, slower.")
