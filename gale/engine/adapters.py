"""Many LoRA adapters over one base, in one batch (Hu et al. 2022; many at once: S-LoRA, Sheng et al. 2024).

The base's linear layers read the whole batch once, whoever asked; then each adapter adds its product of two narrow
matrices to the rows of those sequences that asked for it. It stands beside a layer as a hook on its call, so whatever
multiplies there - bf16, int8, a kernel - stays as it is, and without adapters there are no hooks.

Shape suffixes as in :mod:`gale.model.transformer`; R rank, I and O a layer's input and output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gale.engine.request import UnknownAdapterError
from gale.model.transformer import Decoder
from gale.text.template import ChatTemplate

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A loaded adapter: by layer, A [R, I] and B [O, R] with the scale in it.

    ``template`` and ``end_tokens`` are the adapter's own, where its folder has a tokenizer. What the model computes
    under one adapter must never be used under another: ``namespace`` is different for each that was ever loaded.
    """

    name: str
    layers: Mapping[str, tuple[Tensor, Tensor]]
    template: ChatTemplate | None = None
    end_tokens: frozenset[int] = frozenset()
    namespace: int = field(default_factory=lambda: next(_numbers))


class BatchAdapters:
    """The adapters over ``model`` and, during a step, the rows of each.

    :meth:`add` and :meth:`remove` may be called from any thread, :meth:`applied` only from the one that runs the model.
    A sequence holds its adapter, so one that was removed lives until its last sequence has ended.
    """

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._loaded: dict[str, Adapter] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._groups: list[tuple[Adapter, slice | Tensor]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """What can be asked for, in the order of loading."""
        return tuple(self._loaded)

    def add(self, adapter: Adapter) -> None:
        """Let requests ask for ``adapter``; it takes the place of one with the same name."""
        self._loaded[adapter.name] = adapter

    def remove(self, name: str) -> None:
        """Let no further request ask for it. Raises :class:`UnknownAdapterError`."""
        if self._loaded.pop(name, None) is None:
            raise UnknownAdapterError(name)

    def get(self, name: str | None) -> Adapter | None:
        """The adapter of that name, none for None. Raises :class:`UnknownAdapterError`."""
        if name is None:
            return None
        try:
            return self._loaded[name]
        except KeyError:
            raise UnknownAdapterError(name) from None

    @contextmanager
    def applied(self, work: Iterable[tuple[Adapter | None, int]]) -> Iterator[None]:
        """For the forward pass within: whose the rows of the batch are, run by run, and how many."""
        self._groups = _groups(work, self._model.embed_tokens.weight.device)
        self._place_hooks()
        self._model.hooked = bool(self._groups)
        try:
            yield
        finally:
            self._groups, self._model.hooked = [], False

    def _place_hooks(self) -> None:
        """Hooks on the layers that this step's adapters change; none at all once nothing is loaded any more."""
        for adapter, _ in self._groups:
            for name in adapter.layers.keys() - self._hooks.keys():
                self._hooks[name] = self._model.get_submodule(name).register_forward_hook(self._hook(name))
        if self._hooks and not self._loaded and not self._groups:
            for hook in self._hooks.values():
                hook.remove()
            self._hooks.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], out_NO: Tensor) -> None:
            for adapter, rows in self._groups:
                if (layer := adapter.layers.get(name)) is not None:
                    # Not one fused product and sum, which would round otherwise than for rows that are gathered.
                    out_NO[rows] += F.linear(F.linear(inputs[0][rows], layer[0]), layer[1])

        return add


def _groups(work: Iterable[tuple[Adapter | None, int]], device: torch.device) -> list[tuple[Adapter, slice | Tensor]]:
    """The rows of each adapter: a slice where they stand together, else their numbers."""
    runs: dict[Adapter, list[range]] = {}
    low = 0
    for adapter, count in work:
        if adapter is not None:
            own = runs.setdefault(adapter, [])
            if own and own[-1].stop == low:
                own[-1] = range(own[-1].start, low + count)
            else:
                own.append(range(low, low + count))
        low += count
    return [
        (adapter, slice(own[0].start, own[0].stop))
        if len(own) == 1
        else (adapter, torch.tensor(list(itertools.chain(*own)), device=device))
        for adapter, own in runs.items()
    ]
