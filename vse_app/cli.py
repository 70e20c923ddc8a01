"""``vse``: one short function per verb. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from training.errors import InputError, printable
from vse_app import audit_verb, bias_verb, harden_verb, index_verb, search_verb, serve_verb
from vse_app.terminal import number, path, print_json, settle_streams


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run the verb, and end with one line on stderr whatever goes wrong.

    Bad input and files that cannot be used end with status 2, a fault of the program with status 1; with
    ``VSE_DEBUG=1`` that keeps its trace.
    """
    settle_streams()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("faiss", "httpx", "huggingface_hub", "mcp", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with suppress(ValueError, OSError):  # every segment of a gallery holds open files
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    args, rest = _parser().parse_known_args(arguments)
    run: Callable[..., None] = args.run
    if rest and run is not _train:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        run(args, rest) if run is _train else run(args)
        if sys.stdout:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit("vse: interrupted")
    except BrokenPipeError:  # `vse search … | head`; what is left in the buffer must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        _end(error)


def _end(error: Exception) -> None:
    from index.errors import GalleryError, remedy

    if isinstance(error, InputError | GalleryError):
        message, status = str(error), 2
    elif isinstance(error, OSError) and error.errno:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        message, status = f"{where}{error.strerror}; {remedy(error, 'check the path')}", 2
    elif os.environ.get("VSE_DEBUG"):
        raise error
    else:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        message, status = f"{what} (a fault of this program; VSE_DEBUG=1 shows where)", 1
    print(f"vse: {printable(message)}", file=sys.stderr)
    sys.exit(status)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for all bad input."""
        print(f"vse: {printable(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vse",
        description="Match photographs and sentences: train with hard negatives, index, search.",
        epilog="Data is named KIND:PATH (karpathy:DIR, coco:DIR, precomputed:DIR, folder:DIR, dedup:FILE, scenes:N). "
        "See docs/data.md.",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = verbs.add_parser("demo", help="the whole story on the built-in data, in a few minutes")
    verb.add_argument("--out", type=path, default=Path("demo"), help="folder for everything (default: demo)")
    verb.add_argument("--scenes", type=int, default=6000, help="number of generated pictures")
    verb.add_argument("--no-browser", action="store_true", help="for scripts: end without serving the page")
    verb.set_defaults(run=_demo)

    verb = verbs.add_parser("data", help="look at data before training on it")
    kinds = verb.add_subparsers(metavar="check|scenes|vocab", required=True)
    check = kinds.add_parser("check", help="read every split, decode every picture, report what is wrong")
    check.add_argument("data", help="KIND:PATH")
    check.add_argument("--split", default=None, help="only this split")
    check.add_argument("--json", action="store_true", help="machine-readable")
    check.set_defaults(run=_data_check)
    scenes = kinds.add_parser("scenes", help="write the built-in data set as files")
    scenes.add_argument("out", type=path, help="folder to write")
    scenes.add_argument("--count", type=int, default=6000, help="number of pictures")
    scenes.add_argument("--seed", type=int, default=0)
    scenes.set_defaults(run=_data_scenes)
    vocab = kinds.add_parser("vocab", help="print the word vocabulary of the training split")
    vocab.add_argument("data", help="KIND:PATH")
    vocab.add_argument("--split", default="train")
    vocab.add_argument("--min-count", type=number(int, 1), default=4)
    vocab.set_defaults(run=_data_vocab)

    verb = verbs.add_parser("features", help="compute image features once, as a precomputed: data set")
    verb.add_argument("data", help="KIND:PATH")
    verb.add_argument("--image-encoder", required=True, help="torchvision:NAME or hf:REPO_OR_DIR")
    verb.add_argument("--pooling", default="mean", choices=["mean", "max", "mean+max"])
    verb.add_argument(
        "--size", type=number(int, 0), default=0, help="input side in pixels (default: the encoder's own)"
    )
    verb.add_argument("--splits", nargs="+", default=["train", "val"])
    verb.add_argument("--out", type=path, required=True)
    verb.set_defaults(run=_features)

    verb = verbs.add_parser(
        "train",
        help="train a dual encoder",
        add_help=False,
        usage="vse train [RECIPE.toml] --data DATA --out RUN [--resume] [--field.sub VALUE ...]",
    )
    verb.set_defaults(run=_train)

    verb = verbs.add_parser("evaluate", help="recall in both directions")
    verb.add_argument("model", help="run directory or hub name")
    verb.add_argument("--data", required=True, help="KIND:PATH")
    verb.add_argument("--split", default="test")
    verb.add_argument(
        "--folds", type=number(int, 1), default=None, help="average over contiguous folds, e.g. 5 for COCO 1K"
    )
    verb.add_argument(
        "--ties",
        default="pessimistic",
        choices=["pessimistic", "expected", "optimistic"],
        help="equal scores count against the model (default), in random order (exact means), or for it",
    )
    verb.add_argument("--json", type=path, default=None, metavar="FILE", help="write the figures; - prints them")
    verb.add_argument("--worst", type=number(int, 0), default=0, metavar="N", help="also print the N worst queries")
    verb.set_defaults(run=_evaluate)

    verb = verbs.add_parser("variance", help="is the training data redundant, and which sampler would gain by it?")
    verb.add_argument("directory", metavar="RUN", type=path, help="run directory; its training is replayed")
    verb.add_argument("--data", default=None, help="KIND:PATH (default: the run's own)")
    verb.add_argument("--epochs", type=int, default=None, help="replay so many (default: all; 0: before training)")
    verb.add_argument("--draws", type=int, default=200, help="batches of each sampler per measurement (default: 200)")
    verb.add_argument("--out", type=path, default=None, help="folder for figures and JSON (default: RUN/variance)")
    verb.add_argument("--dedup", type=path, default=None, metavar="FILE", help="write the data without its copies")
    verb.add_argument("--tolerance", type=float, default=1e-3, help="how much copies may differ (default: 0.001)")
    verb.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    verb.set_defaults(run=_variance)

    audit_verb.add_parser(verbs)
    bias_verb.add_parser(verbs)
    harden_verb.add_parser(verbs)
    index_verb.add_parser(verbs)
    search_verb.add_parser(verbs)
    serve_verb.add_parser(verbs)
    return parser


def _demo(args: argparse.Namespace) -> None:
    from vse_app.demo import run_demo, show_demo

    run_demo(args.out, args.scenes)
    if not args.no_browser:
        show_demo(args.out)


def _data_check(args: argparse.Namespace) -> None:
    from vse_app.data_check import check_data

    report = check_data(args.data, args.split)
    if args.json:
        print_json(report.to_json())
    else:
        print(report.text())
    if report.problems:
        sys.exit(2)


def _data_scenes(args: argparse.Namespace) -> None:
    from training.data.formats.scenes import write_scenes

    write_scenes(args.out, args.count, args.seed)
    print(f"{args.count} scenes in {args.out}; train on them with --data karpathy:{args.out}")


def _data_vocab(args: argparse.Namespace) -> None:
    from training.data.formats import load_corpus
    from training.data.text import WordTokenizer

    words = WordTokenizer.fit(load_corpus(args.data, args.split).captions, args.min_count).words
    print("\n".join(words))
    print(f"{len(words)} words seen at least {args.min_count} times in {args.data} [{args.split}]", file=sys.stderr)


def _features(args: argparse.Namespace) -> None:
    from training.models.config import ImageTowerConfig
    from vse_app.feature_export import export_features

    config = ImageTowerConfig(
        encoder=args.image_encoder, pooling=args.pooling, size=args.size, head="linear", frozen=True
    )
    for line in export_features(args.data, args.splits, config, args.out):
        print(line)
    print(f"train on them with --data precomputed:{args.out}")


def _train(args: argparse.Namespace, rest: list[str]) -> None:
    from vse_app.train_arguments import read_arguments

    config, resume = read_arguments(rest)
    from training.trainer import Trainer

    best = Trainer(config, resume).fit()
    print(f"best validation rSum {best['rsum']:.1f}; weights, card and log in {config.out}")


def _evaluate(args: argparse.Namespace) -> None:
    from training.data.formats import load_corpus
    from training.evaluation.protocols import evaluate, worst_queries
    from training.evaluation.ranks import retrieval_ranks
    from training.evaluation.report import format_table, format_worst
    from training.files import write_text
    from training.models.dual_encoder import DualEncoder
    from training.models.features import encode_corpus

    model = DualEncoder.from_pretrained(args.model)
    corpus = load_corpus(args.data, args.split)
    images, captions = encode_corpus(model, corpus)
    scores = model.similarity.scores
    metrics = evaluate(images, captions, corpus.owner, scores, args.folds, args.ties)
    record = json.dumps(metrics.to_json(args.data, args.split), indent=2)
    piped = args.json == Path("-")
    print(record if piped else format_table(metrics, args.data, args.split))
    if args.worst:
        ranks = retrieval_ranks(images, captions, corpus.owner, scores, args.ties)
        worst = worst_queries(ranks, corpus, args.worst)
        print(format_worst(worst), file=sys.stderr if piped else sys.stdout)
    if args.json and not piped:
        write_text(args.json, record + "\n")


def _variance(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from training.config import read_toml
    from training.data.formats import dedup
    from vse_app import variance_report as report
    from vse_app.figures import require_matplotlib
    from vse_app.gradient_study import GradientStudy

    if not args.no_plot:
        require_matplotlib()
    if args.draws < 4:
        raise InputError(f"variance: --draws {args.draws}: too few to estimate a variance; take 50 or more")
    config = read_toml(args.directory / "config.toml")
    config = replace(config, data=args.data or config.data)
    epochs = config.optim.epochs if args.epochs is None else args.epochs
    if not 0 <= epochs <= config.optim.epochs:
        raise InputError(f"variance: --epochs {epochs}: the run has {config.optim.epochs}; choose from 0 to that")
    out: Path = args.out or args.directory / "variance"
    study = GradientStudy(config, args.draws)
    corpus = study.trainer.train_corpus
    found = study.redundancy(args.tolerance)
    print(report.format_redundancy(found, corpus))
    if args.dedup:
        weights = report.kept_weights(found, corpus)
        dedup.write(args.dedup, config.data, config.train_split, weights)
        print(f"{args.dedup}: {len(weights):,} pairs with weights; train on them with --data dedup:{args.dedup}")
    points = []
    for point in study.points(epochs):
        points.append(point)
        print(f"\n{report.format_point(point)}")
    report.write_json(out / "variance.json", report.to_json(points, found, corpus, config.data, config.train_split))
    written = ["variance.json"]
    if report.write_sheet(found, corpus, out / "copies.png"):
        written.append("copies.png")
    if not args.no_plot:
        title = f"{config.data} [{config.train_split}], {len(corpus):,} pairs, batch {config.optim.batch_size}"
        report.write_plot(points, title, out / "variance.png")
        written.append("variance.png")
    print(f"\n{out}: {', '.join(written)}")


if __name__ == "__main__":
    main()
