"""The log-probability head: equal to log-softmax, in value and gradient, however many rows are widened at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gale.model.attention import PackedAttention
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer
from gale.train import losses
from gale.train.batches import IGNORED, Batch
from gale.train.losses import token_logprobs, trained_logprobs


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("wide_scores", [1, 100, 2**20])
def test_values_and_gradients_are_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch, wide_scores: int, softcap: float | None
) -> None:
    monkeypatch.setattr(losses, "_WIDE_SCORES", wide_scores)
    torch.manual_seed(0)
    x, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    targets, upstream = torch.randint(11, (7,)), torch.randn(7)
    results = []

    def plain(x: Tensor, w: Tensor, t: Tensor, cap: float | None) -> Tensor:
        scores = x @ w.T if cap is None else cap * torch.tanh(x @ w.T / cap)
        return F.log_softmax(scores, -1).gather(1, t[:, None]).squeeze(1)

    for function in (token_logprobs, plain):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = function(*leaves, targets, softcap)
        (out.double() * upstream).sum().backward()
        results.append([out.detach().double(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_only_trained_targets_are_scored_and_in_order(model: Decoder, tokenizer: Tokenizer) -> None:
    ids = torch.tensor(tokenizer.encode("The wind came over the hill and the door fell shut."))
    targets = ids.roll(-1)
    targets[-1] = IGNORED
    targets[::3] = IGNORED
    batch = Batch(ids, targets, torch.arange(len(ids)), [len(ids)])
    with torch.no_grad():
        logits = model.logits(model(ids, batch.positions_N, PackedAttention([len(ids)])))
        kept = targets != IGNORED
        expected = F.log_softmax(logits[kept].float(), -1).gather(1, targets[kept][:, None]).squeeze(1)
        torch.testing.assert_close(trained_logprobs(model, batch), expected)
