"""A small gallery and its server, for tests of both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from starlette.testclient import TestClient

from training.data.text import WordTokenizer
from training.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from training.models.dual_encoder import DualEncoder
from vse_app.search_engine import Facts, SearchEngine
from vse_app.search_service import SearchService
from vse_app.server import Serving, create_app

COLOURS, SHAPES = ["red", "green", "blue", "white"], ["disc", "ring", "star", "cross", "heart", "square"]
COUNT = len(COLOURS) * len(SHAPES)
MARKER = "BEGIN-SECRET-4f1d0c"
"""What a file beside the gallery says that no answer may."""
COMMENT, MAKER = b"a comment nobody asked for", "Camera of somebody"


@dataclass(frozen=True)
class Place:
    """A gallery, and what it was made of.

    Attributes:
        gallery: Its directory.
        model: Run directory of the model.
        pictures: Files, in order of their ids, which start with 1.
        captions: Theirs; each is one of a kind.
        secret: A text file beside the gallery that holds :data:`MARKER`.
    """

    gallery: Path
    model: Path
    pictures: list[Path]
    captions: list[str]
    secret: Path

    @property
    def facts(self) -> dict[Path, Facts]:
        """What the gallery knows of each picture."""
        return {
            path: Facts(
                caption,
                {"year": 2000 + n, "colour": caption.split()[0], "tags": caption.split(), "at": {"row": n // 6}},
            )
            for n, (path, caption) in enumerate(zip(self.pictures, self.captions, strict=True))
        }


def furnish(folder: Path) -> Place:
    """A random model, 24 noisy pictures with captions and metadata, and the gallery of both."""
    torch.manual_seed(0)
    words = COLOURS + SHAPES
    config = ModelConfig(image=ImageTowerConfig(size=16), text=TextTowerConfig(word_dim=8), dim=8)
    DualEncoder(config, WordTokenizer(words, min_count=1, source="test")).save_pretrained(folder / "model")
    captions = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    pictures = [folder / "photos" / f"photo{n:02}.{'jpg' if n == 0 else 'png'}" for n in range(COUNT)]
    pictures[0].parent.mkdir()
    for n, path in enumerate(pictures):
        path.write_bytes(jpeg(n) if n == 0 else encoded(pixels(n), "PNG"))
    secret = folder / "secret.txt"
    secret.write_text(MARKER * 50)
    place = Place(folder / "gallery", folder / "model", pictures, captions, secret)
    with SearchEngine.open_or_create(place.gallery, place.model) as engine:
        engine.add(pictures, place.facts)
    return place


@contextmanager
def serving(place: Place, **options: Any) -> Iterator[tuple[TestClient, SearchService]]:
    """The server without its page, as ``Serving`` is told, and what searches in it."""
    with SearchService(place.gallery) as service:
        app = create_app(service, Serving(place.gallery, **options), page=False)
        with TestClient(app, "http://127.0.0.1:7860", raise_server_exceptions=False) as client:
            yield client, service


def pixels(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Coarse noise of one main colour, so that pictures differ."""
    random = np.random.default_rng(seed)
    grid = random.integers(0, 256, (8, 8, 3)) // 2 + random.integers(0, 128, 3)
    return Image.fromarray(grid.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """A picture's file."""
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def jpeg(seed: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """A JPEG file that tells where it was taken, with what, and more in a comment."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = MAKER
    exif.get_ifd(ExifTags.IFD.GPSInfo).update(
        {ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: (47.0, 22.0, 7.0)}
    )
    return encoded(pixels(seed, size), "JPEG", quality=95, exif=exif, comment=COMMENT, icc_profile=b"profile " * 9)


def is_bare(data: bytes) -> bool:
    """Whether a JPEG file holds pixels alone."""
    with Image.open(BytesIO(data)) as image:
        extra = {"exif", "comment", "icc_profile", "xmp"} & image.info.keys()
        return image.format == "JPEG" and not extra and not image.getexif() and COMMENT not in data
