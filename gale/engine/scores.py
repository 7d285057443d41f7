"""Log-probabilities of tokens, as the model itself gives them: at temperature 1, nothing left out.

Shape suffixes: R rows, V vocabulary, P the likeliest tokens that are asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gale.engine.request import TokenScore


def score_rows(logits_RV: Tensor, tokens: list[int], top: int) -> list[TokenScore]:
    """The score of ``tokens[r]`` under row r, with the ``top`` likeliest tokens beside it; fp32 throughout.

    A token that is among the likeliest has the identical number in both places, for callers that compare them.
    """
    logprobs_RV = torch.log_softmax(logits_RV.float(), dim=-1)
    chosen_R = logprobs_RV.gather(1, torch.tensor(tokens, device=logits_RV.device)[:, None])[:, 0].tolist()
    best_RP, ids_RP = logprobs_RV.topk(min(top, logprobs_RV.shape[1]), dim=-1)
    return [
        TokenScore(token, logprob, tuple(zip(ids, best, strict=True)))
        for token, logprob, ids, best in zip(tokens, chosen_R, ids_RP.tolist(), best_RP.tolist(), strict=True)
    ]
