"""``vse demo``: train, evaluate, index, search and attack the built-in scenes, then show them in a browser."""

from __future__ import annotations

import json
import socket
import time
import webbrowser
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from index.errors import GalleryError
from index.relevance import Relevance, sample
from training.config import read_toml
from training.data.corpus import Corpus
from training.data.formats import load_corpus
from training.evaluation.protocols import evaluate
from training.evaluation.report import format_table
from training.files import replacing, write_text
from training.models.dual_encoder import DualEncoder
from training.models.features import encode_corpus
from training.robustness.audit import Audit, AuditConfig
from training.trainer import STATE_FILE, Trainer
from vse_app.audit_figures import write_figures
from vse_app.audit_report import format_report, write_files
from vse_app.contact_sheet import Row, contact_sheet
from vse_app.search_engine import Facts, Result, SearchEngine
from vse_app.serve_verb import require_gradio

RECIPE = Path(__file__).parents[1] / "training" / "recipes" / "scenes.toml"
QUERIES, SHOWN = 4, 5
PORT = 7860
AUDIT = AuditConfig(queries=40, others=10, epsilons=(1 / 255, 2 / 255, 4 / 255, 8 / 255), trials=4, severities=(3,))

NEXT = """
Next, your own photographs. The model above knows discs and squares only; train one that knows the world:
  vse train flickr8k_frozen --data karpathy:PATH/TO/flickr8k --out runs/flickr8k
  vse index my-gallery add ~/Pictures --model runs/flickr8k
  vse index my-gallery tune --queries karpathy:PATH/TO/flickr8k
  vse serve my-gallery
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
    write_text(run / "test.json", json.dumps(metrics.to_json(data, "test"), indent=2) + "\n")

    print("\n3. Index the test pictures")
    paths = _write_pictures(corpus, out / "pictures")
    with SearchEngine.open_or_create(out / "gallery", run) as engine:
        engine.add(paths, {path: Facts(_captions(corpus, image)[0]) for image, path in enumerate(paths)})
        held_out = load_corpus(data, "val")
        _calibrate(engine, *encode_corpus(model, held_out), held_out.owner)
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
    print(f"\n{sheet} shows these searches, the described picture framed.")

    print("\n5. How easily is it fooled?")
    audit = Audit(model, corpus, AUDIT, run / "audit")
    record = audit.run()
    print(format_report(record))
    write_files(record, run / "audit")
    if find_spec("matplotlib"):
        write_figures(record, audit, run / "audit")
    print(f"\n{time.monotonic() - started:.0f} seconds.")
    print(NEXT)


def show_demo(out: Path) -> None:
    """Serve the gallery of :func:`run_demo` and open a browser, until interrupted.

    Raises:
        InputError: If Gradio is missing.
    """
    require_gradio()
    from vse_app.server import Serving, serve

    def ready(address: str) -> None:
        print(f"\n6. Look at it: {address} (Ctrl+C stops)", flush=True)
        webbrowser.open(address)

    serve(Serving(out / "gallery", run=out / "run", port=_free(PORT)), ready)


def _calibrate(engine: SearchEngine, images: Tensor, captions: Tensor, owner: NDArray[np.int64]) -> None:
    """Probabilities and a cut for the gallery's results, from captions that are not of its pictures."""
    with suppress(GalleryError):  # too few captions, or a model that cannot tell them apart
        found = Relevance.fit(captions.numpy(), images.numpy(), owner, sample(engine.gallery.snapshot))
        engine.gallery.install_calibration(found.save)


def _free(port: int) -> int:
    with socket.socket() as probe:
        return 0 if probe.connect_ex(("127.0.0.1", port)) == 0 else port


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
