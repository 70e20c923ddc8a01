"""``vse bias``: the optimiser, the regulariser and the architecture decide robustness. Heavy imports wait."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vse_app.terminal import path


def add_parser(verbs: Any) -> None:
    """Add the verb to the program's subparsers."""
    verb = verbs.add_parser(
        "bias",
        help="a study: does the optimiser alone make a linear model robust?",
        description="Trains linear models on generated data in many ways, and compares how far each is from the most "
        "robust one there is. Tables, JSON and figures go to a folder.",
    )
    verb.add_argument("--out", type=path, default=Path("bias"), help="folder for everything (default: bias)")
    verb.add_argument("--quick", action="store_true", help="fewer data sets and steps: under a minute")
    verb.add_argument("--seeds", type=int, default=None, help="data sets per ratio (default: 3)")
    verb.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    verb.set_defaults(run=_bias)


def _bias(args: argparse.Namespace) -> None:
    import json
    from dataclasses import replace

    from training.files import write_text
    from training.robustness.linear.study import QUICK, Study, StudyConfig
    from vse_app.bias_report import format_study, write_figures
    from vse_app.figures import require_matplotlib
    from vse_app.terminal import progress_bar

    if not args.no_plot:
        require_matplotlib()
    config = QUICK if args.quick else StudyConfig()
    if args.seeds is not None:
        config = replace(config, seeds=args.seeds)
    with progress_bar("data set") as progress:
        record = Study(config, progress).run()
    text = format_study(record)
    print(text)
    write_text(args.out / "bias.json", json.dumps(record) + "\n")
    write_text(args.out / "bias.txt", text + "\n")
    written = ["bias.json", "bias.txt"]
    if not args.no_plot:
        written += write_figures(record, args.out)
    print(f"\n{args.out}: {', '.join(written)}")
