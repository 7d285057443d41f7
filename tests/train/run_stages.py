"""Trains what a folder of recipes asks for, in as many processes as torchrun starts: see test_processes.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from gale.train.dpo import dpo
from gale.train.grow import grow
from gale.train.pretrain import pretrain
from gale.train.recipe import DpoRecipe, GrowRecipe, PretrainRecipe, RewardRecipe, SftRecipe
from gale.train.reward import reward
from gale.train.sft import sft

STAGES = {
    "pretrain": (pretrain, PretrainRecipe),
    "grow": (grow, GrowRecipe),
    "sft": (sft, SftRecipe),
    "reward": (reward, RewardRecipe),
    "dpo": (dpo, DpoRecipe),
}


def main() -> None:
    """Run every ``NAME.json`` of the folder, ``{"stage", "recipe"}``, into the folder ``NAME`` beside it."""
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for path in sorted(folder.glob("*.json")):
        wanted = json.loads(path.read_text())
        run, kind = STAGES[wanted["stage"]]
        run(kind.model_validate(wanted["recipe"]), folder / path.stem)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
