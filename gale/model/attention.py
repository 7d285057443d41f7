"""Causal attention over packed documents: what the trainer hands to the decoder as ``attend``.

On a CPU torch's own ``scaled_dot_product_attention`` is slower in bf16 than plain matrix products, and a mask makes
it slower still (measured; see docs/benchmarks.md). Here documents are laid side by side, longest first, and a block
of queries is computed for all documents that reach so far in a few large products; nothing outside a document is
ever computed, let alone masked.

Shape suffixes as in :mod:`gale.model.transformer`; B documents, L padded length, M = documents x key heads,
G query heads sharing one key head, Q queries of one document in one block, R = G x Q, S the keys visible to the block,
P all queries of all heads, block after block, so that each block's are one contiguous piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gale.model.config import ModelConfig

# Large enough for efficient matrix products, small enough that a block's scores stay in the processor's cache.
_QUERY_BLOCK = 64


class PackedAttention:
    """``attend`` for N tokens that are documents of ``lengths`` tokens, one after another (they sum to N).

    ``config`` says in which layers a token sees only the newest tokens, itself among them (Jiang et al. 2023), and
    whether scores are soft-capped; without it, every token sees all of its document so far.
    """

    def __init__(
        self, lengths: list[int], device: torch.device | None = None, *, config: ModelConfig | None = None
    ) -> None:
        assert lengths and min(lengths) > 0, "documents have at least one token"
        self._windows = [config.window(layer) or 0 for layer in range(config.layers)] if config else []
        self._softcap = (config.attention_softcap if config else None) or 0.0
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
        window = self._windows[layer] if self._windows else 0
        # The operator loads the compiler when it is first called, which those who only read need not wait for.
        compute = packed_attention if torch.compiler.is_compiling() or torch.is_grad_enabled() else _attention
        out: Tensor = compute(q_NHD, k_NKD, v_NKD, self.gather_BL, self.place_N, self.sizes_B, window, self._softcap)
        return out


def _attention(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    gather_BL: Tensor,
    place_N: Tensor,
    sizes_B: Tensor,
    window: int,
    softcap: float,
) -> Tensor:
    """Softmax attention of each token over itself and the earlier tokens of its document: [N, H, D] -> [N, H, D].

    ``window`` is the number of newest tokens seen, 0 for all; ``softcap`` bends scores, 0 leaves them.
    """
    blocks = _blocks(sizes_B, window)
    q_PD = _take(q_NHD, _tiles(gather_BL, blocks))
    k_MLD, v_MLD = (_take(x, gather_BL).view(-1, gather_BL.shape[1], x.shape[-1]) for x in (k_NKD, v_NKD))
    out_PD = torch.empty_like(q_PD)
    for block, q_MRD, out_MRD in _by_block(blocks, k_NKD.shape[1], q_NHD.shape[1], q_PD, out_PD):
        k_MSD, v_MSD = (_keys(x_MLD, len(q_MRD), block).contiguous() for x_MLD in (k_MLD, v_MLD))
        torch.bmm(_probabilities(q_MRD, k_MSD, window, softcap)[0], v_MSD, out=out_MRD)
    return _put_back(out_PD, _slots(place_N, blocks, gather_BL.shape[1]), _QUERY_BLOCK, q_NHD)


# A custom operator, so that torch.compile takes it as one opaque step instead of compiling anew for every packing.
packed_attention = torch.library.custom_op("gale::packed_attention", _attention, mutates_args=())


@packed_attention.register_fake
def _(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    gather_BL: Tensor,
    place_N: Tensor,
    sizes_B: Tensor,
    window: int,
    softcap: float,
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
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the probabilities are computed again rather than kept (Dao et al. 2022)."""
    blocks = _blocks(sizes_B, window)
    tiles_TQ, slots_N = _tiles(gather_BL, blocks), _slots(place_N, blocks, gather_BL.shape[1])
    q_PD, grad_PD = _take(q_NHD, tiles_TQ), _take(grad_NHD, tiles_TQ)
    if tiles_TQ.numel() > len(place_N):
        # Padding must not send gradients to the tokens it repeats: a padded query's own gradient is zero.
        padding_TQ = torch.ones_like(tiles_TQ, dtype=torch.bool)
        padding_TQ.view(-1)[slots_N] = False
        grad_PD.view(len(tiles_TQ), -1, *tiles_TQ.shape[1:], grad_PD.shape[1]).masked_fill_(
            padding_TQ[:, None, :, None], 0
        )
    k_MLD, v_MLD = (_take(x, gather_BL).view(-1, gather_BL.shape[1], x.shape[-1]) for x in (k_NKD, v_NKD))
    dq_PD = torch.empty_like(q_PD)
    # Several blocks add to one key's gradient: summed in fp32, so that long documents lose nothing.
    dk_MLD = torch.zeros_like(k_MLD, dtype=torch.promote_types(k_MLD.dtype, torch.float32))
    dv_MLD = torch.zeros_like(dk_MLD)
    scale = q_NHD.shape[-1] ** -0.5
    for block, q_MRD, do_MRD, dq_MRD in _by_block(blocks, k_NKD.shape[1], q_NHD.shape[1], q_PD, grad_PD, dq_PD):
        k_MSD, v_MSD = (_keys(x_MLD, len(q_MRD), block).contiguous() for x_MLD in (k_MLD, v_MLD))
        dk_MSD, dv_MSD = (_keys(x_MLD, len(q_MRD), block) for x_MLD in (dk_MLD, dv_MLD))
        p_MRS, slope_MRS = _probabilities(q_MRD, k_MSD, window, softcap)
        dp_MRS = torch.bmm(do_MRD, v_MSD.transpose(1, 2))
        ds_MRS = torch._softmax_backward_data(dp_MRS, p_MRS, -1, p_MRS.dtype)
        if slope_MRS is not None:
            ds_MRS *= slope_MRS
        dq_MRD.baddbmm_(ds_MRS, k_MSD, beta=0, alpha=scale)
        dk_MSD.add_(torch.bmm(ds_MRS.transpose(1, 2), q_MRD), alpha=scale)
        dv_MSD += torch.bmm(p_MRS.transpose(1, 2), do_MRD)
    length = gather_BL.shape[1]
    return (
        _put_back(dq_PD, slots_N, _QUERY_BLOCK, q_NHD),
        _put_back(dk_MLD, place_N, length, k_NKD),
        _put_back(dv_MLD, place_N, length, v_NKD),
    )


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
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_NHD, k_NKD, v_NKD))
    return q, k, v


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_NHD: Tensor) -> tuple[Tensor | None, ...]:
    gradients = packed_attention_backward(grad_NHD, *ctx.saved_tensors, ctx.window, ctx.softcap)
    return (*gradients, None, None, None, None, None)


packed_attention.register_autograd(_backward, setup_context=_save)


class _Block(NamedTuple):
    """Queries ``low`` to ``high`` of the ``documents`` that reach so far; they see keys from ``first`` on."""

    low: int
    high: int
    first: int
    documents: int


def _blocks(sizes_B: Tensor, window: int) -> list[_Block]:
    sizes = sizes_B.tolist()  # longest first
    return [
        _Block(
            low,
            low + _QUERY_BLOCK,
            max(0, low - window + 1) if window else 0,
            sum(size > low for size in sizes),
        )
        for low in range(0, sizes[0], _QUERY_BLOCK)
    ]


def _by_block(blocks: list[_Block], key_heads: int, heads: int, *flat_PD: Tensor) -> Iterator[tuple[Any, ...]]:
    """Each block with its part [M, R, D] of every tensor."""
    at = 0
    for block in blocks:
        queries = block.documents * heads * _QUERY_BLOCK
        parts = (x_PD[at : at + queries].view(block.documents * key_heads, -1, x_PD.shape[1]) for x_PD in flat_PD)
        yield block, *parts
        at += queries


def _keys(x_MLD: Tensor, rows: int, block: _Block) -> Tensor:
    """What a block of queries sees; a product makes it contiguous slowly, so do that where it is multiplied by."""
    return x_MLD[:rows, block.first : block.high]


def _tiles(gather_BL: Tensor, blocks: list[_Block]) -> Tensor:
    """Tokens [T, Q] of the T pairs of a block and a document in it, block after block."""
    return torch.cat([gather_BL[: block.documents, block.low : block.high] for block in blocks])


def _slots(place_N: Tensor, blocks: list[_Block], length: int) -> Tensor:
    """Where each of the N tokens stands in :func:`_tiles`."""
    counts = torch.tensor([block.documents for block in blocks], device=place_N.device)
    document_N, position_N = place_N // length, place_N % length
    block_N = position_N // _QUERY_BLOCK
    return ((counts.cumsum(0) - counts)[block_N] + document_N) * _QUERY_BLOCK + position_N % _QUERY_BLOCK


def _probabilities(q_MRD: Tensor, k_MSD: Tensor, window: int, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Attention weights [M, R, S] of a block of queries over their documents' keys; the last query is the last key.

    With a soft-cap also its slope at each score, for the gradient.
    """
    (rows, queries, size), keys = q_MRD.shape, k_MSD.shape[1]
    scores_MRS = q_MRD.new_empty(rows, queries, keys).baddbmm_(q_MRD, k_MSD.transpose(1, 2), beta=0, alpha=size**-0.5)
    slope_MRS: Tensor | None = None
    if softcap:
        bent_MRS = scores_MRS.div_(softcap).tanh_()
        slope_MRS = 1 - bent_MRS.square()
        scores_MRS = bent_MRS.mul_(softcap)
    scores_MGQS = scores_MRS.view(rows, -1, _QUERY_BLOCK, keys)
    # Minus infinity where a query may not look: at keys after its own, and at those its window has left behind.
    hidden_QQ = q_MRD.new_full((_QUERY_BLOCK, _QUERY_BLOCK), float("-inf")).triu_(1)
    scores_MGQS[..., -_QUERY_BLOCK:] += hidden_QQ
    if window:
        scores_MGQS += q_MRD.new_full((_QUERY_BLOCK, keys), float("-inf")).tril_(keys - _QUERY_BLOCK - window)
    return torch.softmax(scores_MRS, -1), slope_MRS


def _take(x_NHD: Tensor, tokens_XS: Tensor) -> Tensor:
    """The heads of tokens [X, S], head by head: [X, H, S] rows of D numbers, flattened to one list."""
    heads, size = x_NHD.shape[1:]
    rows_XHS = tokens_XS[:, None] * heads + torch.arange(heads, device=tokens_XS.device)[:, None]
    return x_NHD.reshape(-1, size).index_select(0, rows_XHS.flatten())


def _put_back(rows: Tensor, slots_N: Tensor, length: int, like_NHD: Tensor) -> Tensor:
    """What :func:`_take` took, as [N, H, D] again: token n stands at ``slots_N[n]`` of [X, S], S = ``length``."""
    heads, size = like_NHD.shape[1:]
    first_N = slots_N // length * (heads * length) + slots_N % length
    rows_NH = first_N[:, None] + torch.arange(heads, device=slots_N.device) * length
    return rows.view(-1, size).index_select(0, rows_NH.flatten()).view_as(like_NHD).to(like_NHD.dtype)
