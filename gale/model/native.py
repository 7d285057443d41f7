"""All layers of a dense decoder in one call of the kernels (``decoder.cpp``).

The modules of :mod:`gale.model.transformer` are the reference: what is computed here is theirs to the bit, without the
microseconds of Python between two kernels, which for a small model are a third of a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gale.model import kernels
from gale.model.packed import PackedLinear

if TYPE_CHECKING:
    from gale.model.transformer import Decoder

_FIRST_POSITIONS = 1024
_MATRICES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_NORMS = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")


def _field(name: str) -> str:
    return name.rpartition(".")[2]


class _Block(ctypes.Structure):
    """Mirror of ``Block`` in decoder.cpp."""

    _fields_ = (
        *((_field(name), ctypes.c_void_p) for name in _NORMS),
        *((_field(name), kernels.Matrix) for name in _MATRICES),
        ("window", ctypes.c_int64),
    )


class _Decoder(ctypes.Structure):
    """Mirror of ``Decoder`` in decoder.cpp."""

    _fields_ = (
        ("blocks", ctypes.POINTER(_Block)),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("layers", "hidden", "intermediate", "heads", "key_heads", "size")),
    )


class NativeLayers:
    """The layers of ``model`` and its last norm, for a model of which :meth:`serve` is true.

    It holds addresses, so the model must live as long and keep its tensors.
    """

    def __init__(self, model: Decoder) -> None:
        config = model.config
        self._blocks = (_Block * config.layers)()
        for layer, (block, native) in enumerate(zip(model.layers, self._blocks, strict=True)):
            for name in _NORMS:
                if config.qk_norm or not name.startswith("self_attn"):
                    setattr(native, _field(name), block.get_parameter(f"{name}.weight").data_ptr())
            for name in _MATRICES:
                linear = block.get_submodule(name)
                assert isinstance(linear, PackedLinear)
                setattr(native, _field(name), linear.matrix())
            native.window = config.window(layer) or 0
        self._decoder = _Decoder(
            self._blocks, model.norm.weight.data_ptr(), config.norm_eps, config.head_dim**-0.5, config.layers,
            config.hidden_size, config.intermediate_size, config.heads, config.kv_heads, config.head_dim,
        )  # fmt: skip
        self._tables = (torch.empty(0), torch.empty(0))

    @staticmethod
    def serve(model: Decoder) -> bool:
        """Whether the layers are such that the kernels know how to put them together."""
        config = model.config
        return (
            served_by_kernels(model)
            and config.experts is None
            and config.activation == "silu"
            and not config.unit_offset_norms
            and not config.post_norms
            and config.query_pre_attn_scalar is None
            and config.local_rope_theta is None
            and config.rotary_dim == config.head_dim
        )

    def __call__(
        self, x_NC: Tensor, positions_N: Tensor, batch: kernels.Batch, rotary: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Final normalised hidden states [N, C] of embedded tokens ``x_NC``, which are written over.

        ``rotary`` makes the tables of positions, which are kept as far as they were needed.
        """
        needed, there = int(positions_N.max()) + 1, len(self._tables[0])
        if needed > there:
            self._tables = rotary(torch.arange(max(needed, 2 * there, _FIRST_POSITIONS)))
        return kernels.decode(self._decoder, batch, x_NC, positions_N, *self._tables)


def served_by_kernels(model: Decoder) -> bool:
    """Whether nothing that takes long is left to torch in a model whose matrices were packed."""
    config, weight = model.config, model.embed_tokens.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.bfloat16
        and kernels.can_attend()
        and config.attention_softcap is None
        and config.head_dim % 4 == 0
        and not any(isinstance(layer, nn.Linear) for layer in model.modules())
    )
