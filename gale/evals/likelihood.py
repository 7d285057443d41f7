"""Log-likelihoods of continuations: the one measure behind bits per byte, pairs, choices and labels.

Text is cut into context and continuation exactly as lm-evaluation-harness does, so that both give the same figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gale.core.progress import Bar
from gale.model.attention import PackedAttention
from gale.model.transformer import Decoder
from gale.text.tokenizer import END_OF_TEXT, Tokenizer

_BATCH_TOKENS = 4096
# Rows of scores over the vocabulary that are widened to fp32 at once.
_SCORED_ROWS = 512


@dataclass(frozen=True, slots=True)
class Request:
    """Tokens to read and the tokens after them whose log-likelihood is asked for."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-likelihoods in nats, one a request, and how many requests had to lose the beginning of their context."""

    nats: list[float]
    truncated: int


def split_text(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """A request from texts: spaces that end the context begin the continuation, and the continuation's tokens are
    what the whole text has beyond the context's own. An empty context is the token that begins a document.
    """
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    if not context:
        return Request(start_tokens(tokenizer), tokenizer.encode(continuation))
    read = tokenizer.encode(context)
    return Request(read, tokenizer.encode(context + continuation)[len(read) :])


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """What stands before a document's first token; a model that knows no such token goes without."""
    for name in (tokenizer.bos_token, END_OF_TEXT):
        if name is not None and (token := tokenizer.token_id(name)) is not None:
            return [token]
    return []


@torch.inference_mode()
def log_likelihoods(model: Decoder, requests: Sequence[Request], *, title: str, room: int | None = None) -> Scored:
    """Summed natural log-probabilities of each continuation given its context.

    Of what is longer than ``room`` tokens the context's beginning is cut off; by default that is one less than the
    model's context, as lm-evaluation-harness leaves a place for the token that a server must generate. The first
    token of a request without context has nothing before it and counts nothing.
    """
    room = room or model.config.context_length - 1
    pieces = [_piece(request, room) for request in requests]
    nats = [0.0] * len(pieces)
    with Bar(f"Reading {title}", len(pieces)) as bar:
        for batch in _batches(pieces):
            for place, value in zip(batch, _score(model, [pieces[place] for place in batch]), strict=True):
                nats[place] = value
            bar.advance(steps=len(batch))
    truncated = sum(len(request.context) + len(request.continuation) > room for request in requests)
    return Scored(nats, truncated)


# Tokens, and the place of the first one that counts.
_Piece = tuple[list[int], int]


def _piece(request: Request, room: int) -> _Piece:
    ids = [*request.context, *request.continuation][-room:]
    return ids, max(1, len(ids) - len(request.continuation))


def _batches(pieces: list[_Piece]) -> Iterator[list[int]]:
    """Places of pieces to read side by side, longest first, for attention computes all of a batch as long as its
    longest."""
    order = sorted(
        (place for place, (ids, first) in enumerate(pieces) if first < len(ids)),
        key=lambda place: (-len(pieces[place][0]), place),
    )
    batch: list[int] = []
    held = 0
    for place in order:
        if batch and held + len(pieces[place][0]) > _BATCH_TOKENS:
            yield batch
            batch, held = [], 0
        batch.append(place)
        held += len(pieces[place][0])
    if batch:
        yield batch


def _score(model: Decoder, pieces: list[_Piece]) -> list[float]:
    device = model.embed_tokens.weight.device
    lengths = [len(ids) - 1 for ids, _ in pieces]
    inputs = torch.tensor([token for ids, _ in pieces for token in ids[:-1]], device=device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    hidden = model(inputs, positions, PackedAttention(lengths, device, config=model.config))
    rows: list[int] = []
    targets: list[int] = []
    start = 0
    for (ids, first), length in zip(pieces, lengths, strict=True):
        rows += range(start + first - 1, start + length)
        targets += ids[first:]
        start += length
    nats: list[float] = []
    for low in range(0, len(rows), _SCORED_ROWS):
        logits = model.logits(hidden[rows[low : low + _SCORED_ROWS]]).float()
        wanted = torch.tensor(targets[low : low + _SCORED_ROWS], device=device)
        nats += (-F.cross_entropy(logits, wanted, reduction="none")).tolist()
    counts = [len(ids) - first for ids, first in pieces]
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [sum(nats[end - count : end]) for count, end in zip(counts, ends, strict=True)]
