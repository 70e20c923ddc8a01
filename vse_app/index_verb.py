"""``vse index``: one short function per action. Heavy imports wait until an action needs them."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from training.errors import printable
from vse_app.terminal import number, path, print_json, progress_bar

if TYPE_CHECKING:
    from vse_app.indexing import AddReport

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_parser(verbs: Any) -> None:
    """Add the verb to the program's subparsers."""
    verb = verbs.add_parser("index", help="a searchable gallery of pictures")
    verb.add_argument("gallery", type=path)
    actions = verb.add_subparsers(metavar="add|remove|info|tune|verify|compact|export|import", required=True)

    add = _action(actions, "add", _add, "index pictures from files and folders", dry_run=True)
    add.add_argument("paths", type=path, nargs="+")
    add.add_argument("--model", type=path, default=None, help="run directory or hub name; needed once")
    add.add_argument(
        "--facts", type=path, default=None, metavar="FILE", help="CSV or JSON lines: image, caption, other fields"
    )
    add.add_argument("--force", action="store_true", help="compare contents even where size and time are the same")
    remove = _action(actions, "remove", _remove, "take pictures out of the gallery; the files stay", dry_run=True)
    remove.add_argument("paths", type=path, nargs="*", help="files, and folders with all that is below")
    remove.add_argument("--missing", action="store_true", help="all whose files are gone")
    remove.add_argument("--yes", action="store_true", help="even if that is more than half of the gallery")
    where_option(remove)
    _action(actions, "info", _info, "what the gallery holds and how it is searched")
    tune = _action(actions, "tune", _tune, "make searching fast at a measured recall", dry_run=True)
    tune.add_argument("--queries", default=None, help="captions as KIND:PATH, texts (.txt), vectors (.npy)")
    tune.add_argument("--model", type=path, default=None, help="where the gallery's model is now, if it was moved")
    tune.add_argument("--split", default="val", help="of the captions (default: val)")
    tune.add_argument(
        "--target-recall", type=number(float, 0, 1), default=0.98, help="share of the true nearest (default: 0.98)"
    )
    tune.add_argument("--memory", type=_bytes, default=None, help="largest index, e.g. 500MB (default: no limit)")
    tune.add_argument("-k", type=number(int, 1), default=10, help="results per query to be found (default: 10)")
    _action(actions, "verify", _verify, "read every byte and compare checksums; status 1 if something is wrong")
    _action(actions, "compact", _compact, "give back the space of what was removed", dry_run=True)
    export = _action(actions, "export", _export, "vectors as .npy and items as Parquet", dry_run=True)
    export.add_argument("out", type=path, help="a new folder, in clip-retrieval's layout")
    imported = _action(actions, "import", _import, "add vectors made elsewhere", dry_run=True)
    imported.add_argument("source", type=path, help="clip-retrieval's folder, a .npy file, or ann-benchmarks' .hdf5")
    imported.add_argument("--model", type=path, default=None, help="what embedded them, to search by text or picture")


def _action(
    actions: Any, name: str, run: Callable[[argparse.Namespace], None], text: str, dry_run: bool = False
) -> argparse.ArgumentParser:
    action: argparse.ArgumentParser = actions.add_parser(name, help=text)
    action.add_argument("--json", action="store_true", help="machine-readable report")
    if dry_run:
        action.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    action.set_defaults(run=run)
    return action


def where_option(parser: argparse.ArgumentParser) -> None:
    """Conditions on the items, which several verbs take."""
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="e.g. 'year>=2019' or 'path~*/holiday/*'; may be given again",
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write e.g. 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _add(args: argparse.Namespace) -> None:
    from index.gallery import Gallery
    from index.tuning import EXACT_UP_TO
    from training.data.image_folders import find_images
    from training.errors import InputError
    from vse_app.facts import FactTable, read_facts
    from vse_app.indexing import AddReport
    from vse_app.search_engine import SearchEngine

    listing = find_images(args.paths)  # a wrong path is refused before a gallery is made
    facts = read_facts(args.facts) if args.facts else FactTable()
    exists, total, slow = Gallery.exists(args.gallery), 0, False
    if not exists and not listing.files and listing.lines():
        raise InputError(f"{args.gallery}: not made, as there are no pictures for it; {listing.lines()[0]}")
    if exists or not args.dry_run:
        if args.dry_run:  # who only looks need not wait for one who writes
            opened = SearchEngine.open(args.gallery)
        else:
            opened = SearchEngine.open_or_create(args.gallery, args.model)
        with opened as engine:
            report = engine.add(listing, facts, dry_run=args.dry_run, force=args.force)
            total = len(engine.gallery)
            slow = engine.gallery.metric == "cosine" and total > EXACT_UP_TO and not engine.gallery.curve()
    else:
        report = AddReport(added=len(listing.files), left_out=listing.lines())
        report.quarantine.refused += listing.refused
    report.left_out += facts.problems
    _tell_added(args, report, total, exists or not args.dry_run)
    if slow:
        print(f"vse index {args.gallery} tune would make searching so many faster", file=sys.stderr)
    if report.in_vain:
        sys.exit(2)


def _tell_added(args: argparse.Namespace, report: AddReport, total: int, exists: bool) -> None:
    if args.json:
        print_json({**report.to_json(), "items": total, "dry_run": args.dry_run})
        return
    for line in [report.quarantine.report(), *(f"note     {printable(line)}" for line in report.left_out)]:
        if line:
            print(line, file=sys.stderr)
    made = f"{_would(args)}{report}; {total} pictures" if exists else f"would be made, with {report.added} pictures"
    print(f"{args.gallery}: {made}")


def _remove(args: argparse.Namespace) -> None:
    from index.errors import GalleryError
    from index.filters import Condition
    from index.gallery import Gallery
    from training.errors import InputError

    if not (args.paths or args.missing or args.where):
        raise InputError("index remove: name files or folders, or give --missing or --where")
    conditions = [Condition.parse(text) for text in args.where]
    with Gallery.open(args.gallery, writable=not args.dry_run) as gallery:
        if unknown := gallery.unknown_fields(conditions):  # year!=2019 holds for all where there is no year
            raise GalleryError(unknown)
        before, chosen = len(gallery), set(gallery.ids_where(conditions).tolist())
        absent = 0
        if args.paths:
            targets = [os.path.realpath(path) for path in args.paths]
            named = {key: item.path for key, item in gallery.items(gallery.snapshot.ids_below(targets))}
            chosen &= named.keys()
            there = {str(folder) for path in named.values() for folder in (path, *PurePath(path).parents)}
            absent = sum(target not in there for target in targets)
        if args.missing:
            chosen &= {key for key, path in gallery.snapshot.paths() if not Path(path).exists()}
        if not args.dry_run:
            if not (args.paths or args.yes) and len(chosen) > before / 2:
                raise InputError(
                    f"{args.gallery}: that would remove {len(chosen)} of {before} pictures; is a drive not there, or "
                    "a condition mistyped? If they are to go, add --yes"
                )
            gallery.remove(chosen)
        total = len(gallery)
    if args.json:
        print_json({"removed": len(chosen), "not_there": absent, "items": total, "dry_run": args.dry_run})
    else:
        print(f"{args.gallery}: {_would(args)}{len(chosen)} removed, {absent} not there; {total} pictures")


def _info(args: argparse.Namespace) -> None:
    from index.gallery import Gallery

    with Gallery.open(args.gallery) as gallery:
        info = gallery.info()
    if args.json:
        print_json(info)
    else:
        print("\n".join(f"{key:9} {printable(str(value))}" for key, value in info.items()))


def _tune(args: argparse.Namespace) -> None:
    from index.errors import GalleryError
    from index.gallery import Gallery
    from index.relevance import Relevance, sample
    from index.tuning import tune
    from vse_app.search_engine import SearchEngine, named_model
    from vse_app.tuning_queries import read_queries

    if args.dry_run:
        opened = SearchEngine(Gallery.open(args.gallery), named_model(args.model))
    else:
        opened = SearchEngine.open(args.gallery, writable=True, model=args.model)
    with opened as engine:
        gallery = engine.gallery
        held_out = read_queries(gallery, lambda: engine.model, args.queries, args.split)
        relevance = None
        with progress_bar() as progress:
            tuning = tune(
                gallery,
                held_out.sample(),
                source=held_out.source,
                target_recall=args.target_recall,
                memory=args.memory,
                k=args.k,
                dry_run=args.dry_run,
                progress=progress,
            )
        if held_out.images is not None and held_out.owner is not None:
            try:
                relevance = Relevance.fit(held_out.queries, held_out.images, held_out.owner, sample(gallery.snapshot))
            except GalleryError as error:  # too few captions, say; searching is tuned all the same
                print(f"no probabilities: {error}", file=sys.stderr)
            if relevance and not args.dry_run:
                gallery.install_calibration(relevance.save)
    quality = relevance.quality if relevance else None
    if args.json:
        print_json(
            {
                **tuning.to_json(held_out.source),
                "calibration": relevance.calibration.to_json() if relevance else None,
                "querybank_beta": relevance.bank.beta if relevance and relevance.bank else None,
                "dry_run": args.dry_run,
            }
        )
        return
    print(_curve(tuning.points, str(tuning.chosen)))
    print(
        f"{args.gallery}: {_would(args)}searched by {tuning.chosen}; recall@{tuning.k} "
        f"{tuning.held_out_recall:.4f} on {tuning.queries - tuning.queries // 2:,} other queries ({held_out.source})"
    )
    if relevance and quality:
        print(
            f"from probability {relevance.cut:.2f} on marked likely: {quality.recall:.0%} of {quality.captions:,} "
            f"other captions have their own image there, among {quality.images:,}; precision {quality.precision:.0%}"
        )


def _verify(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from index.verification import verify

    with tqdm(desc="verify", unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def advance(step: int, total: int) -> None:
            bar.total = total
            bar.update(step)

        found = verify(args.gallery, advance)
    if args.json:
        record = {"problems": found.problems, "leftovers": [str(path) for path in found.leftovers]}
        print_json({**record, "files": found.files, "bytes": found.bytes})
    else:
        for line in [*found.problems, *(f"{path}: left behind, no part of it" for path in found.leftovers)]:
            print(printable(line))
        print(f"{args.gallery}: {found.files} files, {found.bytes:,} bytes, {len(found.problems)} problems")
    if found.problems:
        sys.exit(1)


def _compact(args: argparse.Namespace) -> None:
    from index.gallery import Gallery

    with Gallery.open(args.gallery, writable=not args.dry_run) as gallery:
        before = gallery.info()
        if not args.dry_run:
            gallery.compact()
        after = gallery.info()
    if args.json:
        print_json({"before": before, "after": after, "dry_run": args.dry_run})
        return
    gone = f"{before['removed']} removed rows would be given back" if args.dry_run else f"now {after['bytes']:,} bytes"
    print(f"{args.gallery}: {before['bytes']:,} bytes in {before['segments']} segments, {gone}")


def _export(args: argparse.Namespace) -> None:
    from index.exchange import export_gallery
    from index.gallery import Gallery

    with Gallery.open(args.gallery) as gallery:
        total = len(gallery)
        if not args.dry_run:
            with progress_bar() as progress:
                export_gallery(gallery, args.out, progress)
    if args.json:
        print_json({"items": total, "out": str(args.out), "dry_run": args.dry_run})
    else:
        print(f"{args.out}: {_would(args)}{total} vectors and items written")


def _import(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from index.exchange import ImportReport, import_vectors, source_shape
    from index.gallery import Gallery

    rows, dim = source_shape(args.source)
    if args.dry_run and not Gallery.exists(args.gallery):
        if args.json:
            print_json({**asdict(ImportReport(added=rows)), "items": 0})
        else:
            print(f"{args.gallery}: would be made, with {rows:,} vectors of {dim} dimensions")
        return
    if Gallery.exists(args.gallery):
        gallery = Gallery.open(args.gallery, writable=not args.dry_run)
    else:
        model = _identity(args.model) if args.model else {"name": f"vectors of {args.source.name}", "checksum": ""}
        gallery = Gallery.create(args.gallery, dim=dim, metric="cosine", model=model)
    with gallery, progress_bar() as progress:
        report = import_vectors(gallery, args.source, progress, dry_run=args.dry_run)
        total = len(gallery)
    if args.json:
        print_json({**asdict(report), "items": total})
        return
    for line in report.skipped:
        print(printable(line), file=sys.stderr)
    print(
        f"{args.gallery}: {_would(args)}{report.added} added ({report.normalised} scaled to length 1), "
        f"{report.skipped_rows} skipped; {total} items"
    )


def _curve(points: list[Any], chosen: str) -> str:
    """The operating points that nothing measured beats in both recall and speed, as a table."""
    lines = [f"{'':50} {'recall':>7} {'queries/s':>10} {'ms alone':>9} {'MB':>8}"]
    fastest = 0.0
    best_first = sorted(points, key=lambda point: (-point.recall, -point.queries_per_second))
    for point in best_first:
        if point.queries_per_second > fastest or str(point) == chosen:
            fastest = max(fastest, point.queries_per_second)
            mark = "→ " if str(point) == chosen else "  "
            lines.append(
                f"{mark + str(point):50} {point.recall:7.4f} {point.queries_per_second:10,.0f} "
                f"{point.milliseconds:9.2f} {point.bytes / 1e6:8.1f}"
            )
    return "\n".join(lines)


def _identity(model: Path) -> dict[str, str]:
    from training.models.dual_encoder import DualEncoder
    from vse_app.search_engine import identity

    return identity(model, DualEncoder.from_pretrained(model))


def _would(args: argparse.Namespace) -> str:
    return "would be " if args.dry_run else ""
