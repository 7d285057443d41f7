"""Bits per byte: how well a model predicts text, comparable between vocabularies.

The negative log-likelihood of a text in bits, divided by its size in UTF-8 bytes (Gao et al. 2020). 8 is knowing
nothing; gzip reaches about 3 on English prose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from gale.core.errors import DataError
from gale.evals.likelihood import Request, log_likelihoods, start_tokens
from gale.evals.scores import Score, bootstrap
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer

CHANCE = math.log2(256)


def bits_per_byte(model: Decoder, tokenizer: Tokenizer, texts: Iterable[str], *, window: int, title: str) -> Score:
    """Bits per UTF-8 byte of ``texts``, read in windows of at most ``window`` tokens that overlap by one.

    The interval is over whole texts. Raises :class:`DataError` where there is no text.
    """
    start = start_tokens(tokenizer)
    window = min(window, model.config.context_length)
    requests: list[Request] = []
    owners: list[int] = []
    sizes: list[int] = []
    for text in texts:
        ids = [*start, *tokenizer.encode(text)]
        pieces = [ids[low : low + window + 1] for low in range(0, max(1, len(ids) - 1), window)]
        requests += [Request(piece[:1], piece[1:]) for piece in pieces if len(piece) > 1]
        owners += [len(sizes)] * (len(requests) - len(owners))
        sizes.append(len(text.encode("utf-8", "surrogatepass")))
    if not requests:
        raise DataError(f"There is no text to read in {title}.", hint="Check the evaluation recipe's sources.")
    nats = log_likelihoods(model, requests, title=title, room=window + 1).nats
    bits = np.bincount(owners, weights=-np.asarray(nats), minlength=len(sizes)) / math.log(2)
    size = np.asarray(sizes, dtype=np.float64)
    low, high = bootstrap(lambda chosen: float(bits[chosen].sum() / size[chosen].sum()), len(sizes))
    value = float(bits.sum() / size.sum())
    return Score(title, "bits per byte", value, low, high, CHANCE, len(sizes), lower_is_better=True)
