"""``vse search``: by text, by picture, by both, by something in the gallery, or by a vector."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from training.errors import InputError, printable
from vse_app.index_verb import where_option
from vse_app.terminal import number, path, print_json

if TYPE_CHECKING:
    from vse_app.queries import Query
    from vse_app.search_engine import Result


def add_parser(verbs: Any) -> None:
    """Add the verb to the program's subparsers."""
    verb = verbs.add_parser("search", help="search a gallery by text, by picture, or by both")
    verb.add_argument("gallery", type=path)
    verb.add_argument("text", nargs="?", help="what to look for")
    verb.add_argument("--image", type=path, default=None, help="look for pictures like this one")
    verb.add_argument(
        "--weight", type=number(float, 0, 1), default=0.5, help="say of the text beside a picture (default: 0.5)"
    )
    verb.add_argument("--like", default=None, metavar="PATH|ID", help="more like this one of the gallery")
    verb.add_argument("--vector", type=path, default=None, metavar="FILE.npy", help="one embedding, or one a row")
    verb.add_argument("--queries", type=path, default=None, metavar="FILE.txt", help="many texts, one a line")
    verb.add_argument("-k", type=number(int, 1), default=10, help="number of results (default: 10)")
    where_option(verb)
    verb.add_argument(
        "--model", type=path, default=None, metavar="RUN", help="where the gallery's model is now, if it was moved"
    )
    verb.add_argument(
        "--collapse", type=float, default=None, metavar="COSINE", help="show pictures this alike once, e.g. 0.95"
    )
    verb.add_argument("--querybank", action="store_true", help="push back pictures that come up for everything")
    verb.add_argument("--likely", action="store_true", help="only results above the calibrated cut")
    verb.add_argument("--json", action="store_true")
    verb.set_defaults(run=_search)


def _search(args: argparse.Namespace) -> None:
    from index.filters import Condition
    from vse_app.search_engine import SearchEngine

    conditions = [Condition.parse(text) for text in args.where]
    queries = _queries(args)
    with SearchEngine.open(args.gallery, model=args.model) as engine:
        answers = engine.search(
            queries, args.k, where=conditions, collapse_at=args.collapse, correct_hubs=args.querybank
        )
        if unknown := engine.gallery.unknown_fields(conditions):
            print(printable(unknown), file=sys.stderr)
        if args.likely and not engine.relevance:
            raise InputError(f"{args.gallery}: has no calibrated cut; vse index tune makes one, or leave out --likely")
        for query in queries:
            if query.text and engine.knows_no_word(query.text):
                print(f"“{printable(query.text)}”: the model knows none of these words", file=sys.stderr)
    if args.likely:
        answers = [[result for result in results if result.likely is not False] for results in answers]
    several = args.queries is not None or len(queries) > 1
    if args.json:
        records = [[_record(result) for result in results] for results in answers]
        if several:
            print_json([{"query": query.text, "results": of} for query, of in zip(queries, records, strict=True)])
        else:
            print_json(records[0])
        return
    for query, results in zip(queries, answers, strict=True):
        if several:
            print(f"“{printable(query.text)}”" if query.text else "")
        for rank, result in enumerate(results, 1):
            print(_line(rank, result))
        if not results:
            print("nothing found", file=sys.stderr)


def _queries(args: argparse.Namespace) -> list[Query]:
    from training.data.formats.records import text_lines
    from vse_app.queries import Query, read_vectors

    if args.queries:
        if args.text or args.image or args.like or args.vector:
            raise InputError("search: --queries stands alone; leave the text, --image, --like and --vector out")
        queries = [Query(text=line) for _, line in text_lines(args.queries) if line.strip()]
        if not queries:
            raise InputError(f"{args.queries}: holds no text; write one query a line")
        return queries
    if args.vector:
        return [Query(vector=vector) for vector in read_vectors(args.vector)]
    like = int(args.like) if args.like and args.like.isdigit() else args.like and os.path.realpath(args.like)
    return [Query(text=args.text, image=args.image, weight=args.weight, like=like)]


def _record(result: Result) -> dict[str, Any]:
    record = {"id": result.id, "path": result.item.path, "score": result.score, "caption": result.item.caption}
    record |= {"probability": result.probability, "likely": result.likely, "metadata": result.item.metadata}
    return record | {"alike": result.alike, "duplicates": [hit.item.path for hit in result.duplicates]}


def _line(rank: int, result: Result) -> str:
    probability = "" if result.probability is None else f"  {result.probability:4.0%}{'*' if result.likely else ' '}"
    caption = f"  “{printable(result.item.caption)}”" if result.item.caption else ""
    same = f"  (+{result.alike} alike)" if result.alike else ""
    return f"{rank:3}  {result.score:6.3f}{probability}  {printable(result.item.path)}{caption}{same}"
