"""``gale train sft``: a base model learns to answer, with the loss on the assistant's tokens only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gale.data.prepare import ready_data
from gale.train.loop import run
from gale.train.next_token import next_token
from gale.train.recipe import SftRecipe
from gale.train.tuning import tuned_decoder


def sft(recipe: SftRecipe, out: Path, *, resume: bool = False, packed: bool = True) -> dict[str, Any]:
    """Fine-tune ``recipe.base``; see :func:`gale.train.loop.run`. Unless ``packed``, a row is one conversation."""
    data = ready_data(recipe.data)
    objective = next_token(recipe, data, loss_on="trained", long="cut", packed=packed)
    return run(tuned_decoder("sft", recipe, data, objective), out, resume=resume)
