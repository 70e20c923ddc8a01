"""``vse harden``: train the linear image head of a run anew, so that more of its recall is certified."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vse_app.terminal import path

if TYPE_CHECKING:
    from torch import Tensor

    from training.robustness.linear.retrieval_heads import HeadEvaluation


def add_parser(verbs: Any) -> None:
    """Add the verb to the program's subparsers."""
    verb = verbs.add_parser(
        "harden",
        help="train a run's linear image head anew, for recall that is certified against attacks on its features",
        description="Trains u = W f on the pooled, standardised features of the training split against the embeddings "
        "of its captions, with a logistic ranking loss of images as queries; searches by text may lose. Prints clean "
        "R@1 beside certified R@1 in three norms, for the run's own head, for plain gradient descent and for the new "
        "head, and writes a run with the new head.",
    )
    verb.add_argument("model", metavar="RUN", help="run directory or hub name; with a linear image head")
    verb.add_argument("--data", required=True, help="KIND:PATH")
    verb.add_argument("--out", type=path, required=True, help="folder for the new run")
    verb.add_argument(
        "--head-optimizer",
        default="gradient",
        choices=["gradient", "sign", "coordinate", "spectral", "rows"],
        help="norm of the steepest descent steps (default: gradient)",
    )
    verb.add_argument(
        "--head-regularizer",
        default="margin",
        choices=["none", "l1", "l2", "linf", "margin"],
        help="norm of all entries of W, or what a unit attack gains on a mean pair of captions (default: margin)",
    )
    verb.add_argument(
        "--norm", default="l2", choices=["linf", "l2", "l1"], help="attack the margin penalty is for (default: l2)"
    )
    verb.add_argument(
        "--penalties",
        nargs="+",
        type=float,
        default=[0.3, 1.0, 3.0],
        metavar="SHARE",
        help="weights tried; 1 weighs the penalty of gradient descent's head like one unit of log loss",
    )
    verb.add_argument("--steps", type=int, default=100, help="at most so many; held-out images choose (default: 100)")
    verb.add_argument("--batch", type=int, default=1000, help="images in a batch (default: 1000)")
    verb.add_argument("--train-split", default="train")
    verb.add_argument("--split", default="val", help="that the table is about (default: val)")
    verb.add_argument("--seed", type=int, default=0, help="decides held-out images and batches")
    verb.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Train, print the table, write the new run."""
    import json
    from dataclasses import replace

    from training.data.formats import load_corpus
    from training.errors import InputError
    from training.files import write_text
    from training.models.dual_encoder import DualEncoder
    from training.robustness.linear import head_training as heads
    from training.robustness.linear.retrieval_heads import ATTACK_OF_PENALTY, evaluate_head
    from vse_app import harden_report as report
    from vse_app.figures import require_matplotlib
    from vse_app.terminal import progress_bar

    if not args.no_plot:
        require_matplotlib()
    hardened = (args.out / "harden.json").exists() and args.out.resolve() != Path(args.model).resolve()
    if (args.out / "config.json").exists() and not hardened:
        raise InputError(f"--out {args.out}: holds a run, whose head would be lost; give another folder")
    attack = ATTACK_OF_PENALTY.get(args.head_regularizer)
    recipe = heads.HeadRecipe(
        args.head_optimizer,
        args.head_regularizer,
        attack.name if attack else args.norm,
        tuple(args.penalties),
        args.steps,
        args.batch,
    )
    plain_recipe = replace(recipe, optimizer="gradient", regularizer="none")
    model = DualEncoder.from_pretrained(args.model)
    train, test = (heads.image_pairs(model, load_corpus(args.data, split)) for split in (args.train_split, args.split))
    mean, std = train.moments()
    pairs, held = (part.to(model.device) for part in train.standardised(mean, std).held_out(args.seed))
    test = test.standardised(mean, std)

    weight, bias = heads.current_head(model, mean, std)
    rows = {"the run's own": (evaluate_head(weight, *test, bias=bias), heads.text_recall(weight, test, bias))}
    with progress_bar("step") as progress:

        def fit(recipe: heads.HeadRecipe, label: str, plain: Any = None) -> heads.TrainedHead:
            done = lambda number: progress(label, number, recipe.steps)  # noqa: E731
            return heads.train(recipe, pairs, held, plain, args.seed, done)

        def measured(weight: Tensor) -> tuple[HeadEvaluation, float]:
            return evaluate_head(weight, *test), heads.text_recall(weight, test)

        chosen = fit(plain_recipe, "gradient descent")
        rows["gradient descent"] = measured(chosen.weight)
        if recipe != plain_recipe:
            label = report.head_label(recipe.optimizer, recipe.regularizer, recipe.attack)
            chosen = fit(recipe, label, chosen.weight)
            rows[label] = measured(chosen.weight)

    about = {"run": args.model, "data": args.data, "split": args.split, "seed": args.seed}
    record = report.to_record(about, rows, test, chosen)
    print(report.format_table(record))
    heads.set_head(model, chosen.weight, mean, std)
    model.save_pretrained(args.out, report.model_card(record, figure=not args.no_plot))
    write_text(args.out / "harden.json", json.dumps(record) + "\n")
    if not args.no_plot:
        report.write_figure(record, args.out / report.FIGURE)
    print(f"\n{args.out}: the run with its new head, harden.json" + (f", {report.FIGURE}" * (not args.no_plot)))
