"""Preferences by number: pair g of a run is the same whatever came before, so a resumed run needs no more than a count.

Both halves of a pair stand in one batch, each a piece of its own: attention never crosses from one answer to another.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from gale.core.errors import DataError
from gale.data.shards import TokenSplit
from gale.train.batches import IGNORED, Batch

# A prompt that is cut still has at least this share of the room; where it cannot, the pair teaches nothing.
_PROMPT_SHARE = 0.25


class PairedRows:
    """The pairs of a split, shuffled anew each epoch; a half is at most ``row_tokens`` tokens, prompt and answer.

    Where a half is longer, the beginning of the prompt is left out, the same of both halves; where even the end of
    the prompt would not fit beside the answers, the pair is dropped. ``cut`` and ``dropped`` count them. Raises
    :class:`DataError` for a split that holds no pairs, or none that fits.
    """

    def __init__(self, split: TokenSplit, *, row_tokens: int, seed: int) -> None:
        self._split, self._seed = split, seed
        if not split.pairs:
            raise DataError(
                f"The split {split.name!r} holds no preferences.",
                hint="Prepare sources of the format preference ({prompt, chosen, rejected}).",
            )
        kept: list[tuple[int, int]] = []  # number of the pair in the split, tokens of its prompt that are left out
        self.cut = self.dropped = 0
        for pair in range(len(split) // 2):
            prompt, answers = self._measure(pair)
            room = row_tokens - max(answers)
            if room < min(prompt, _PROMPT_SHARE * row_tokens):
                self.dropped += 1
                continue
            self.cut += room < prompt
            kept.append((pair, max(0, prompt - room)))
        if not kept:
            raise DataError(
                f"No pair of the split {split.name!r} fits into {row_tokens} tokens.", hint="Raise row_tokens."
            )
        self._kept = np.array(kept)

    def __len__(self) -> int:
        return len(self._kept)

    def place(self, row: int) -> int:
        """Which of the pairs, from 0, is ``row`` of the endless sequence of epochs."""
        epoch, index = divmod(row, len(self))
        return int(self._order(epoch)[index])

    def batch(self, first_row: int, rows: int) -> Batch:
        """Rows ``first_row`` to ``first_row + rows``: 2 x ``rows`` pieces, the chosen half before the rejected one.

        A piece ends with its answer's last token, which predicts nothing, so that a reward model can be asked there.
        """
        return self.batch_of([self.place(row) for row in range(first_row, first_row + rows)])

    def batch_of(self, places: list[int]) -> Batch:
        """As :meth:`batch` for pairs by their places."""
        ids, targets, lengths = [], [], []
        for pair, skipped in self._kept[places]:
            for half in (2 * pair, 2 * pair + 1):
                tokens, trained = self._split.document(int(half))
                end = _end(trained)
                piece = tokens[skipped:end].astype(np.int64)
                following = np.append(piece[1:], IGNORED)
                following[:-1][~trained[skipped + 1 : end]] = IGNORED
                ids.append(piece)
                targets.append(following)
                lengths.append(len(piece))
        positions = np.concatenate([np.arange(length) for length in lengths])
        ids_N, targets_N = torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(targets))
        return Batch(ids_N, targets_N, torch.from_numpy(positions), lengths)

    def describe(self, first_row: int, rows: int) -> str:
        """Which documents stand in these rows, with the source of each where the manifest tells."""
        pairs = dict.fromkeys(int(self._kept[self.place(row)][0]) for row in range(first_row, first_row + rows))
        names = ", ".join(self._split.name_of(2 * pair) for pair in pairs)
        return f"pairs {first_row} to {first_row + rows - 1}, each with the document after it: {names}"

    def _measure(self, pair: int) -> tuple[int, tuple[int, int]]:
        """Tokens of the prompt and of both answers. Raises :class:`DataError` where the two prompts differ."""
        (chosen, chosen_flags), (rejected, rejected_flags) = (self._split.document(2 * pair + half) for half in (0, 1))
        prompt = int(np.argmax(chosen_flags))
        if prompt != int(np.argmax(rejected_flags)) or not np.array_equal(chosen[:prompt], rejected[:prompt]):
            raise DataError(
                f"The two halves of a preference have different prompts ({self._split.name_of(2 * pair)}).",
                hint="The chat template must write the prompt alike whatever the answer is.",
            )
        return prompt, (_end(chosen_flags) - prompt, _end(rejected_flags) - prompt)

    @lru_cache(maxsize=2)  # noqa: B019 (one object lives as long as the run)
    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self))


def _end(trained: npt.NDArray[np.bool_]) -> int:
    """The place after the last trained token: what a template writes after an answer is no part of it."""
    return len(trained) - int(np.argmax(trained[::-1]))
