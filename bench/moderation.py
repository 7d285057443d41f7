"""The moderation classifier beside a linear model of character n-grams that saw the same rows.

    .venv/bin/python -m bench.moderation

The linear model (TF-IDF of one to four characters, logistic regression by scikit-learn, which comes with
lm-evaluation-harness) is trained on the training part of ``recipes/moderation/data.toml``, the classifier's own; its
threshold is 1/2. Both are scored on the files that are in no training recipe. Writes ``bench/results/moderation.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from gale.core.recipe import load_recipe
from gale.evals.classification import macro_f1
from gale.evals.recipe import ClassifyTask, EvalRecipe
from gale.evals.report import evaluate
from gale.evals.rows import task_items
from gale.registry.models import BUILTIN, MODERATION
from gale.text.tokenizer import Tokenizer
from gale.train.calibration import expected_calibration_error
from gale.train.labelled import LabelledData, read_labelled
from gale.train.recipe import ClassifierRecipe

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes/moderation"
RESULTS = Path(__file__).parent / "results" / "moderation.json"


def main() -> None:
    """Train the linear model, score both, and write what was found."""
    stage, tasks = (
        load_recipe(RECIPES / "classifier.toml", ClassifierRecipe),
        load_recipe(RECIPES / "eval.toml", EvalRecipe),
    )
    data, tokenizer = load_recipe(stage.data, LabelledData), Tokenizer.load(BUILTIN)
    rows = read_labelled(data, tokenizer, row_tokens=stage.row_tokens).training
    report = evaluate(MODERATION, tasks)
    results: dict[str, Any] = {"rows": len(rows), "compute": report["compute"], "tasks": {}}
    for score in report["scores"]:
        results["tasks"].setdefault(score["task"], {"classifier": {}, "linear": {}})["classifier"][score["metric"]] = {
            key: score[key] for key in ("value", "low", "high", "chance", "majority", "items")
        }
    features = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), min_df=3, sublinear_tf=True)
    seen = features.fit_transform([tokenizer.decode(row.ids) for row in rows])
    for place, label in enumerate(data.labels):
        known = np.array([row.labels[place] for row in rows])
        linear = LogisticRegression(C=4, max_iter=200).fit(seen[~np.isnan(known)], known[~np.isnan(known)])
        for task in tasks.tasks:
            if isinstance(task, ClassifyTask) and label in task.texts:
                items = task_items(task)
                right = np.array([task.labels[str(item.value(task.label))] == label for item in items])
                chance = linear.predict_proba(features.transform([item.fill(task.prompt) for item in items]))[:, 1]
                given = chance >= 0.5
                results["tasks"][task.name]["linear"] = {
                    "acc": round(float((given == right).mean()), 4),
                    "macro_f1": round(macro_f1(right.astype(int), given.astype(int), 2), 4),
                    "ece": round(expected_calibration_error(chance, right), 4),
                }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
