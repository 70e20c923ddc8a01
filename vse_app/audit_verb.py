"""``vse audit``: how easily is this search fooled?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vse_app.terminal import path

EPSILONS = ["0.5/255", "1/255", "2/255", "4/255", "8/255"]


def add_parser(verbs: Any) -> None:
    """Register the verb."""
    verb = verbs.add_parser(
        "audit",
        help="attack the search: how far do perturbed pictures and edited captions move the ranks?",
        description="Attacks against the exact gallery of a split, checks of the attacks, and certificates. "
        "A killed audit goes on when it is started again.",
    )
    verb.add_argument("model", metavar="RUN", help="run directory or hub name")
    verb.add_argument("--data", required=True, help="KIND:PATH")
    verb.add_argument("--split", default="test")
    verb.add_argument(
        "--threat",
        nargs="+",
        default=["all"],
        help="query-image, gallery-owner, gallery-promote, query-text, corruption (default: all of them)",
    )
    verb.add_argument("--epsilons", nargs="+", metavar="ε", help=f"radii (default: {' '.join(EPSILONS)})")
    verb.add_argument(
        "--norm",
        default="linf",
        help="linf (default), l2, l1, fourier-linf (a limit for every frequency), fourier-linf/f (limits that fall as "
        "1/f), or one of the last two in a band, as fourier-linf[low,high], in units of Nyquist",
    )
    verb.add_argument(
        "--queries",
        type=int,
        help="images attacked as queries (default: 200; an eighth for other threats unless named)",
    )
    verb.add_argument("--steps", type=int, help="most gradient steps per picture and ε (default: 50)")
    verb.add_argument("--strong", action="store_true", help="further losses, targets, starts and random search")
    verb.add_argument("--quick", action="store_true", help="fewer of everything: minutes rather than a quarter hour")
    verb.add_argument("--characters", type=int, default=2, help="character edits of a caption (default: 2)")
    verb.add_argument("--words", type=int, default=0, help="word edits of a caption (default: 0)")
    verb.add_argument("--synonyms", type=path, metavar="FILE", help="lines of 'word: other, another', for word edits")
    verb.add_argument("--seed", type=int, default=0, help="decides the subset and everything random")
    verb.add_argument("--out", type=path, help="folder for the report (default: RUN/audit)")
    verb.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Audit, print the tables, and write JSON, Parquet and figures."""
    from training.config import parse_epsilon
    from training.data.formats import load_corpus
    from training.errors import InputError
    from training.models.dual_encoder import DualEncoder
    from training.robustness.audit import THREATS, Audit, AuditConfig
    from training.robustness.text_edits import TextBudget, load_synonyms
    from vse_app import audit_report
    from vse_app.audit_figures import write_figures
    from vse_app.figures import require_matplotlib

    if not args.no_plot:
        require_matplotlib()
    if args.norm != "linf" and not args.epsilons:
        raise InputError(f"--norm {args.norm}: radii mean something else in every norm; add --epsilons")
    named = "all" not in args.threat
    queries = args.queries or (40 if args.quick else 200)
    radii = args.epsilons or (["1/255", "4/255"] if args.quick else EPSILONS)
    read = parse_epsilon if args.norm == "linf" else parse_radius
    config = AuditConfig(
        threats=tuple(args.threat) if named else THREATS,
        queries=queries,
        others=queries if named else max(queries // 8, 1),
        epsilons=tuple(read(radius) for radius in radii),
        norm=args.norm,
        steps=args.steps or (20 if args.quick else 50),
        strong=args.strong,
        trials=4 if args.quick else 12,
        severities=(3,) if args.quick else (1, 3, 5),
        text=TextBudget(args.characters, args.words),
        seed=args.seed,
    )
    synonyms = load_synonyms(args.synonyms) if args.synonyms else None
    model = DualEncoder.from_pretrained(args.model)
    corpus = load_corpus(args.data, args.split)
    out: Path = args.out or Path(args.model) / "audit"
    audit = Audit(model, corpus, config, out, synonyms)
    record = audit.run()
    print(audit_report.format_report(record))
    written = audit_report.write_files(record, out)
    if not args.no_plot:
        written += write_figures(record, audit, out)
    print(f"\n{out}: {', '.join(written)}")


def parse_radius(text: str) -> float:
    """A radius in a norm other than ℓ∞, as ``2`` or ``8/255``."""
    from training.errors import InputError

    above, _, below = text.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"ε = {text!r}: not a number; write 2 or 8/255") from None
