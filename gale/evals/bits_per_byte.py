"""Bits per byte: how well a model predicts text, comparable between vocabularies.

The negative log-likelihood of a text in bits, divided by its size in UTF-8 bytes (Gao et al. 2020). 8 is knowing
nothing; gzip reaches about 3 on English prose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from gale.core.errors import DataError
from gale.core.progress import Bar
from gale.model.attention import PackedAttention
from gale.model.transformer import Decoder
from gale.text.tokenizer import END_OF_TEXT, Tokenizer

_BATCH_TOKENS = 4096


@torch.inference_mode()
def bits_per_byte(model: Decoder, tokenizer: Tokenizer, texts: Iterable[str], *, window: int, title: str) -> float:
    """Bits per UTF-8 byte of ``texts``, read in windows of at most ``window`` tokens that overlap by one.

    Raises :class:`DataError` where there is no text.
    """
    start = _start_token(tokenizer)
    window = min(window, model.config.context_length)
    pieces: list[list[int]] = []
    size = 0
    for text in texts:
        size += len(text.encode("utf-8", "surrogatepass"))
        ids = [*start, *tokenizer.encode(text)]
        pieces += [ids[low : low + window + 1] for low in range(0, max(1, len(ids) - 1), window)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise DataError(f"There is no text to read in {title}.", hint="Check the evaluation recipe's sources.")
    nats = 0.0
    with Bar(f"Reading {title}", len(pieces)) as bar:
        for batch in _batches(pieces):
            nats += _loss(model, batch)
            bar.advance(steps=len(batch))
    return nats / math.log(2) / size


def _loss(model: Decoder, pieces: list[list[int]]) -> float:
    """Summed negative log-likelihood in nats of every token but each piece's first."""
    device = model.embed_tokens.weight.device
    inputs = torch.tensor([token for piece in pieces for token in piece[:-1]], device=device)
    targets = torch.tensor([token for piece in pieces for token in piece[1:]], device=device)
    positions = torch.cat([torch.arange(len(piece) - 1) for piece in pieces]).to(device)
    attend = PackedAttention(
        [len(piece) - 1 for piece in pieces],
        device,
        sliding_window=model.config.sliding_window,
        sliding_from_layer=model.config.sliding_from_layer,
    )
    logits = model.logits(model(inputs, positions, attend))
    return float(F.cross_entropy(logits.float(), targets, reduction="sum"))


def _start_token(tokenizer: Tokenizer) -> list[int]:
    """What stands before a document's first token; a model that knows no such token goes without."""
    for name in (tokenizer.bos_token, END_OF_TEXT):
        if name is not None and (token := tokenizer.token_id(name)) is not None:
            return [token]
    return []


def _batches(pieces: list[list[int]]) -> Iterable[list[list[int]]]:
    batch: list[list[int]] = []
    for piece in pieces:
        if batch and sum(map(len, batch)) + len(piece) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch
