"""Causal attention over packed documents: what the trainer hands to the decoder as ``attend``.

On a CPU torch's own ``scaled_dot_product_attention`` is slower in bf16 than plain matrix products, and a mask makes
it slower still (measured; see docs/benchmarks.md). Here documents are laid side by side, longest first, and a block
of queries is computed for all documents that reach so far in a few large products; nothing outside a document is
ever computed, let alone masked.

Shape suffixes as in :mod:`gale.model.transformer`; B documents, L padded length, M = documents x key heads,
G query heads sharing one key head, R = G x the queries of one block, S the keys visible to the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Large enough for efficient matrix products, small enough that a block's scores stay in the processor's cache.
_QUERY_BLOCK = 64


class PackedAttention:
    """``attend`` for N tokens that are documents of ``lengths`` tokens, one after another (they sum to N).

    From layer ``sliding_from_layer`` on a token sees only the ``sliding_window`` newest tokens, itself among them
    (Jiang et al. 2023); None means all of its document so far.
    """

    def __init__(
        self,
        lengths: list[int],
        device: torch.device | None = None,
        *,
        sliding_window: int | None = None,
        sliding_from_layer: int = 0,
    ) -> None:
        assert lengths and min(lengths) > 0, "documents have at least one token"
        self._window, self._window_from_layer = sliding_window or 0, sliding_from_layer
        sizes = torch.tensor(lengths, dtype=torch.int64)
        starts = sizes.cumsum(0) - sizes
        order = torch.argsort(sizes, descending=True, stable=True)
        offsets = torch.arange(-(-max(lengths) // _QUERY_BLOCK) * _QUERY_BLOCK)
        # Padding repeats a document's last token: finite values, seen by no real query because they come after it.
        padded_BL = starts[order, None] + torch.minimum(offsets, sizes[order, None] - 1)
        self.gather_BL = padded_BL.to(device)
        # Where each of the N tokens stands in the padded layout.
        place_N = torch.empty(int(sizes.sum()), dtype=torch.int64)
        valid_BL = offsets < sizes[order, None]
        place_N[padded_BL[valid_BL]] = valid_BL.flatten().nonzero().squeeze(1)
        self.place_N = place_N.to(device)
        self.sizes_B = sizes[order]

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        window = self._window if layer >= self._window_from_layer else 0
        out: Tensor = packed_attention(q_NHD, k_NKD, v_NKD, self.gather_BL, self.place_N, self.sizes_B, window)
        return out


# A custom operator, so that torch.compile takes it as one opaque step instead of compiling anew for every packing.
@torch.library.custom_op("gale::packed_attention", mutates_args=())
def packed_attention(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, gather_BL: Tensor, place_N: Tensor, sizes_B: Tensor, window: int
) -> Tensor:
    """Softmax attention of each token over itself and the earlier tokens of its document: [N, H, D] -> [N, H, D].

    ``window`` is the number of newest tokens seen, 0 for all.
    """
    key_heads = k_NKD.shape[1]
    q_MGLD, k_MGLD, v_MGLD = (_side_by_side(x, gather_BL, key_heads) for x in (q_NHD, k_NKD, v_NKD))
    out_MGLD = torch.empty_like(q_MGLD)
    for low, high, first, reach in _blocks(sizes_B, key_heads, window):
        p_MRS = _probabilities(q_MGLD[:reach, :, low:high], k_MGLD[:reach, 0, first:high], window)
        out_MRD = torch.bmm(p_MRS, v_MGLD[:reach, 0, first:high])
        out_MGLD[:reach, :, low:high] = out_MRD.view(reach, -1, high - low, out_MRD.shape[-1])
    return _one_after_another(out_MGLD, gather_BL, place_N)


@packed_attention.register_fake
def _(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, gather_BL: Tensor, place_N: Tensor, sizes_B: Tensor, window: int
) -> Tensor:
    return torch.empty_like(q_NHD, memory_format=torch.contiguous_format)


@torch.library.custom_op("gale::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad_NHD: Tensor,
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    gather_BL: Tensor,
    place_N: Tensor,
    sizes_B: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the probabilities are computed again rather than kept (Dao et al. 2022)."""
    key_heads = k_NKD.shape[1]
    q_MGLD, k_MGLD, v_MGLD = (_side_by_side(x, gather_BL, key_heads) for x in (q_NHD, k_NKD, v_NKD))
    # Padding must not send gradients to the tokens it repeats: a padded query's own gradient is zero.
    grad_MGLD = _side_by_side(grad_NHD, gather_BL, key_heads, sizes_B)
    dq_MGLD = torch.empty_like(q_MGLD)
    # Several blocks add to one key's gradient: summed in fp32, so that long documents lose nothing.
    dk_MGLD = torch.zeros_like(k_MGLD, dtype=torch.promote_types(k_MGLD.dtype, torch.float32))
    dv_MGLD = torch.zeros_like(dk_MGLD)
    scale = q_NHD.shape[-1] ** -0.5
    for low, high, first, reach in _blocks(sizes_B, key_heads, window):
        q_MGQD, k_MSD, v_MSD = q_MGLD[:reach, :, low:high], k_MGLD[:reach, 0, first:high], v_MGLD[:reach, 0, first:high]
        p_MRS = _probabilities(q_MGQD, k_MSD, window)
        do_MRD = grad_MGLD[:reach, :, low:high].flatten(1, 2)
        dp_MRS = torch.bmm(do_MRD, v_MSD.transpose(1, 2))
        ds_MRS = torch._softmax_backward_data(dp_MRS, p_MRS, -1, p_MRS.dtype).mul_(scale)
        dq_MGLD[:reach, :, low:high] = torch.bmm(ds_MRS, k_MSD).view_as(q_MGQD)
        dk_MGLD[:reach, 0, first:high] += torch.bmm(ds_MRS.transpose(1, 2), q_MGQD.flatten(1, 2))
        dv_MGLD[:reach, 0, first:high] += torch.bmm(p_MRS.transpose(1, 2), do_MRD)
    dq_NHD, dk_NKD, dv_NKD = (
        _one_after_another(x.to(q_NHD.dtype), gather_BL, place_N) for x in (dq_MGLD, dk_MGLD, dv_MGLD)
    )
    return dq_NHD, dk_NKD, dv_NKD


@packed_attention_backward.register_fake
def _(
    grad_NHD: Tensor,
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    gather_BL: Tensor,
    place_N: Tensor,
    sizes_B: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_NHD, k_NKD, v_NKD))
    return q, k, v


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_NHD: Tensor) -> tuple[Tensor | None, ...]:
    return (*packed_attention_backward(grad_NHD, *ctx.saved_tensors, ctx.window), None, None, None, None)


packed_attention.register_autograd(_backward, setup_context=_save)


def _blocks(sizes_B: Tensor, key_heads: int, window: int) -> Iterator[tuple[int, int, int, int]]:
    """(first query, past the last query, first key, rows of M that reach so far) of every block of queries."""
    sizes = sizes_B.tolist()  # longest first
    for low in range(0, sizes[0], _QUERY_BLOCK):
        first = max(0, low - window + 1) if window else 0
        yield low, low + _QUERY_BLOCK, first, key_heads * sum(size > low for size in sizes)


def _probabilities(q_MGQD: Tensor, k_MSD: Tensor, window: int) -> Tensor:
    """Attention weights [M, R, S] of a block of queries over their documents' keys; the last query is the last key."""
    groups, queries = q_MGQD.shape[1:3]
    keys = k_MSD.shape[1]
    # Minus infinity where a query may not look: at keys after its own, and at those its window has left behind.
    mask_QS = torch.full((queries, keys), float("-inf"), dtype=k_MSD.dtype, device=k_MSD.device)
    hidden_QS = mask_QS.triu(keys - queries + 1)
    if window:
        hidden_QS += mask_QS.tril_(keys - queries - window)
    mask_RS = hidden_QS.repeat(groups, 1)
    scores_MRS = torch.baddbmm(mask_RS, q_MGQD.flatten(1, 2), k_MSD.transpose(1, 2), alpha=k_MSD.shape[-1] ** -0.5)
    return torch.softmax(scores_MRS, -1)


def _side_by_side(x_NHD: Tensor, gather_BL: Tensor, key_heads: int, sizes_B: Tensor | None = None) -> Tensor:
    """[N, H, D] -> [M, G, L, D]; with ``sizes_B`` the padding is zero instead of a repeated token."""
    documents, length = gather_BL.shape
    padded_BLHD = x_NHD.flatten(1).index_select(0, gather_BL.flatten()).view(documents, length, *x_NHD.shape[1:])
    if sizes_B is not None:
        padding_BL = torch.arange(length) >= sizes_B[:, None]
        padded_BLHD.masked_fill_(padding_BL[:, :, None, None].to(x_NHD.device), 0)
    padded_BLKGD = padded_BLHD.view(documents, length, key_heads, -1, x_NHD.shape[-1])
    return padded_BLKGD.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _one_after_another(x_MGLD: Tensor, gather_BL: Tensor, place_N: Tensor) -> Tensor:
    """[M, G, L, D] -> [N, H, D], leaving the padding out."""
    documents, (_, groups, length, head_dim) = gather_BL.shape[0], x_MGLD.shape
    tokens_BLKGD = x_MGLD.view(documents, -1, groups, length, head_dim).permute(0, 3, 1, 2, 4)
    return tokens_BLKGD.reshape(documents * length, -1, head_dim).index_select(0, place_N)
