"""python -m benchmarks.scenes_losses [--scenes 6000] [--seeds 3]

Sum of hinges against the curriculum that ends with the hardest one: the recipe of the demo on the built-in
scenes, several seeds each, evaluated on the test split. Prints the README's table.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace

from training.config import read_toml
from training.data.formats import load_corpus
from training.evaluation.protocols import RetrievalMetrics, evaluate
from training.evaluation.report import markdown_table
from training.models.dual_encoder import DualEncoder
from training.models.features import encode_corpus
from training.trainer import Trainer
from vse_app.demo import RECIPE

LOSSES = {"sum of hinges": "sum", "sum → max of hinges": "curriculum"}


def train_and_test(data: str, loss: str, seed: int) -> RetrievalMetrics:
    recipe = read_toml(RECIPE)
    with tempfile.TemporaryDirectory() as run:
        Trainer(replace(recipe, data=data, out=run, seed=seed, loss=replace(recipe.loss, name=loss))).fit()
        model = DualEncoder.from_pretrained(run)
    test = load_corpus(data, "test")
    return evaluate(*encode_corpus(model, test), test.owner, model.similarity.scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    data = f"scenes:{args.scenes}"
    seeds = range(args.seeds)
    runs = {name: [train_and_test(data, loss, seed) for seed in seeds] for name, loss in LOSSES.items()}
    print(markdown_table(runs, data, "test"))


if __name__ == "__main__":
    main()
