"""Trains a recipe on a two-node Ray cluster of its own; run as a program, since Ray takes over its process."""

from __future__ import annotations

import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from gale.core.errors import GaleError
from gale.core.recipe import load_recipe
from gale.train.on_ray import run_on_ray
from gale.train.pretrain import pretrain
from gale.train.recipe import PretrainRecipe


def main(recipe: Path, out: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    settings = load_recipe(recipe, PretrainRecipe)
    try:
        run_on_ray(pretrain, settings, out, resume=False, address=cluster.address, workers=2, gpus=False)
        wild = settings.optimiser.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0, "gradient_clip": 1e30})
        broken = settings.model_copy(update={"optimiser": wild})
        try:
            run_on_ray(
                pretrain, broken, out.with_name("broken"), resume=False, address=cluster.address, workers=2, gpus=False
            )
        except GaleError as error:
            print(error.message)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
