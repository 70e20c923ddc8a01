"""``vse demo``: train, evaluate, index and search the built-in scenes, in one go."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from PIL import Image

from training.config import read_toml
from training.data.corpus import Corpus
from training.data.formats import load_corpus
from training.evaluation.protocols import evaluate
from training.evaluation.report import format_table
from training.files import replacing
from training.models.dual_encoder import DualEncoder
from training.models.features import encode_corpus
from training.trainer import STATE_FILE, Trainer
from vse_app.contact_sheet import Row, contact_sheet
from vse_app.search_engine import Facts, Result, SearchEngine

RECIPE = Path(__file__).parents[1] / "training" / "recipes" / "scenes.toml"
QUERIES, SHOWN = 4, 5

NEXT = """
Next, your own photographs. The model above knows discs and squares only; train one that knows the world:
  vse train flickr8k_frozen --data karpathy:PATH/TO/flickr8k --out runs/flickr8k
  vse index my-gallery add ~/Pictures --model runs/flickr8k
  vse search my-gallery "two dogs play in the snow"
docs/data.md says how to lay out Flickr8k, Flickr30k, COCO, or your own captions."""


def run_demo(out: Path, scenes: int) -> None:
    """Everything goes to ``out``; a second call goes on where the first one stopped.

    Args:
        out: Folder for the run, the gallery, the pictures and the contact sheet.
        scenes: Number of generated pictures, all splits together.
    """
    started = time.monotonic()
    data, run = f"scenes:{scenes}", out / "run"
    print(f"1. Train a small CNN and a GRU on {data}, from the sum of hinges to the hardest one")
    config = replace(read_toml(RECIPE), data=data, out=str(run))
    Trainer(config, resume=(run / STATE_FILE).exists()).fit()

    print("\n2. Evaluate on pictures it has not seen")
    model = DualEncoder.from_pretrained(run)
    corpus = load_corpus(data, "test")
    images, captions = encode_corpus(model, corpus)
    metrics = evaluate(images, captions, corpus.owner, model.similarity.scores)
    print(format_table(metrics, data, "test"))

    print("\n3. Index the test pictures")
    paths = _write_pictures(corpus, out / "pictures")
    with SearchEngine.open_or_create(out / "gallery", run) as engine:
        engine.add(paths, {path: Facts(_captions(corpus, image)[0]) for image, path in enumerate(paths)})
        print(f"{out / 'gallery'}: {len(engine.gallery)} pictures")

        print("\n4. Search them")
        rows: list[Row] = []
        for image in range(0, len(paths), max(1, len(paths) // QUERIES)):
            if len(rows) == QUERIES:
                break
            query = _captions(corpus, image)[-1]  # worded unlike the one that is kept with the picture
            hits = engine.search_text(query, SHOWN)
            rows.append(Row(query, [Path(hit.item.path) for hit in hits], own=paths[image].resolve()))
            _print_hits(query, hits)
    sheet = out / "searches.png"
    with replacing(sheet) as temporary:
        contact_sheet(rows).save(temporary, format="PNG")
    print(f"\n{sheet} shows these searches, the described picture framed. {time.monotonic() - started:.0f} seconds.")
    print(NEXT)


def _captions(corpus: Corpus, image: int) -> list[str]:
    return [corpus.captions[c] for c in (corpus.owner == image).nonzero()[0]]


def _print_hits(query: str, hits: list[Result]) -> None:
    print(f"“{query}”")
    for rank, hit in enumerate(hits[:3], 1):
        print(f"  {rank}  {hit.score:6.3f}  {Path(hit.item.path).name}  “{hit.item.caption}”")


def _write_pictures(corpus: Corpus, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{image_id}.png" for image_id in corpus.image_ids]
    for source, path in zip(corpus.images, paths, strict=True):
        if not path.exists():
            picture: Image.Image = source.load()
            with replacing(path) as temporary:
                picture.save(temporary, format="PNG")
    return paths
