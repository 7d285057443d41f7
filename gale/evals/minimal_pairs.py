"""Minimal pairs: two sentences that differ in one point of grammar (BLiMP, Warstadt et al. 2020)."""

from __future__ import annotations

from gale.evals.likelihood import log_likelihoods, split_text
from gale.evals.recipe import PairsTask
from gale.evals.rows import task_items
from gale.evals.scores import share_score
from gale.evals.task import SHOWN, TaskResult, group_scores
from gale.model.transformer import Decoder
from gale.text.tokenizer import Tokenizer


def run_pairs(task: PairsTask, model: Decoder, tokenizer: Tokenizer) -> TaskResult:
    """The share of pairs whose good sentence has the higher log-likelihood; equal ones count as wrong."""
    items = task_items(task)
    sentences = [(item.text(task.good), item.text(task.bad)) for item in items]
    requests = [split_text(tokenizer, "", task.delimiter + text) for pair in sentences for text in pair]
    scored = log_likelihoods(model, requests, title=task.name)
    likelihoods = list(zip(scored.nats[::2], scored.nats[1::2], strict=True))
    points = [float(good > bad) for good, bad in likelihoods]
    names = [str(item.value(task.group)) for item in items] if task.group else None
    return TaskResult(
        [share_score(task.name, "acc", points, chance=0.5)],
        group_scores(names, "acc", points, [0.5] * len(points)),
        {"truncated": scored.truncated},
        [
            {"good": good, "bad": bad, "good_nats": round(first, 4), "bad_nats": round(second, 4)}
            for (good, bad), (first, second) in list(zip(sentences, likelihoods, strict=True))[:SHOWN]
        ],
    )
