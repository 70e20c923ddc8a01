"""OMP_NUM_THREADS=1 python -m benchmarks.gallery.vectors [--flickr8k RUN DATA CACHE]

Galleries of image embeddings and caption queries for index benchmarks, and what makes them alike.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


class Statistics(NamedTuple):
    """What decides how hard a gallery is to search, means over a sample; see :func:`statistics`."""

    query_top1: float
    query_top10: float
    query_all: float
    gallery_top1: float
    gallery_all: float
    gallery_dimension: float
    query_dimension: float
    cells: float


def _unit(rows: Rows) -> Rows:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def shifted(count: int, dim: int, queries: int, seed: int) -> tuple[Rows, Rows]:
    """An image-like gallery, and caption-like queries that do not come from its distribution.

    Imitated of two-tower embeddings:

    * Unequal topics: sizes follow a power law. Centres have variances ``exp(-i / 100) / (i + 5)`` along axis ``i``,
      about the spectrum of Flickr8k embeddings; the axes are turned at random.
    * Few local dimensions. Within its topic an image moves along 64 directions of decaying length, drawn anew for
      each topic and longer than topics are apart, so that topics overlap; and a little in all directions.
    * The modality gap (Liang et al. 2022, "Mind the Gap"): all images share one direction, all captions another.
    * Captions say part of what an image shows. Each starts from an image that is not in the gallery, loses more of
      its minor dimensions than of its major ones, and gains noise of its own with the centres' spectrum.

    :func:`statistics` of 7,000 rows, as many as Flickr8k has, and of 200,000:

    =============================  =====  ========  ===================  ====================
    ..                             7,000  Flickr8k  200,000              Flickr8k, replicated
    =============================  =====  ========  ===================  ====================
    query to first hit              0.48      0.50                 0.52                  0.53
    query to tenth hit              0.41      0.43                 0.47                  0.49
    gallery row to its nearest      0.76      0.67                 0.79                  0.84
    any two gallery rows            0.21      0.01                 0.20                  0.00
    dimension around gallery rows   16.0      18.1                 22.5                   8.7
    dimension around queries        36.0      33.2                 49.9                  54.2
    cells that hold 98 % of hits    22 %      21 %                 13 %                   9 %
    =============================  =====  ========  ===================  ====================

    Args:
        count: Gallery rows.
        dim: Dimensions of an embedding.
        queries: Captions.
        seed: Of everything; for each number of queries the gallery is the same.

    Returns:
        Gallery, float32 ``(count, dim)``, and queries, float32 ``(queries, dim)``; rows have unit length.
    """
    random, asking = np.random.default_rng(seed).spawn(2)  # the gallery does not depend on the number of queries
    topics, directions = max(8, int(count**0.5 / 2)), 64
    axis = np.arange(dim, dtype=np.float32)
    scale = np.exp(-axis / 200) / np.sqrt(axis + 5)
    scale /= np.linalg.norm(scale)
    decay = np.arange(1, directions + 1, dtype=np.float32)[:, None] ** -0.5
    decay /= np.linalg.norm(decay)
    size = (np.arange(topics) + 10.0) ** -0.8
    images, captions = np.empty((count, dim), np.float32), np.empty((queries, dim), np.float32)
    sides = [
        (rows, of, of.choice(topics, len(rows), p=size / size.sum()))
        for rows, of in ((images, random), (captions, asking))
    ]
    for topic in range(topics):
        centre, *along = random.standard_normal((directions + 1, dim), np.float32) * scale
        along = random.uniform(1.0, 1.5) * decay * along
        for rows, of, topic_of in sides:
            members = np.flatnonzero(topic_of == topic)
            rows[members] = centre + of.standard_normal((len(members), directions), np.float32) @ along
    images += 0.5 * dim**-0.5 * random.standard_normal(images.shape, np.float32)
    gaps = 0.8 * _unit(random.standard_normal((2, dim), np.float32))
    turn = np.linalg.qr(random.standard_normal((dim, dim)))[0].astype(np.float32)
    captions *= np.sqrt(scale / scale[0])
    captions += 1.2 * scale * asking.standard_normal(captions.shape, np.float32)
    return _unit((images + gaps[0]) @ turn), _unit((captions + gaps[1]) @ turn)


def replicated(images: Rows, captions: Rows, count: int, noise: float, seed: int) -> tuple[Rows, Rows]:
    """Real embeddings made many: every image again and again, moved at random in the space its neighbours span.

    A copy of ``x`` is ``x + noise * sum_j w_j x_j / sqrt(32)`` over its 32 nearest neighbours ``x_j``, with standard
    normal ``w_j`` less their mean, renormalised: ``noise = 1`` moves it about as far as the neighbours are from their
    mean. Copies thus fill the space between neighbours; noise in all directions would leave that space.

    Args:
        images: Float32 ``(M, D)``, unit rows.
        captions: Float32 ``(Q, D)``, unit rows.
        count: Gallery rows wanted, at least ``M``.
        noise: Distance of a copy, in distances to the neighbours.
        seed: Of the noise.

    Returns:
        Gallery, float32 ``(count, D)``, its first ``M`` rows the images themselves; and the captions.
    """
    random = np.random.default_rng(seed)
    neighbours = _exact(images, images, 33)[1][:, 1:]
    gallery = images[np.arange(count) % len(images)]
    for start in range(len(images), count, 4096):
        rows = np.arange(start, min(start + 4096, count)) % len(images)
        weights = random.standard_normal((len(rows), 1, 32), np.float32) * (noise / 32**0.5)
        weights -= weights.mean(axis=2, keepdims=True)
        gallery[start : start + len(rows)] += (weights @ images[neighbours[rows]])[:, 0]
    return _unit(gallery), captions


def flickr8k(run: Path | str, data: str, cache: Path) -> tuple[Rows, Rows]:
    """Embeddings of Flickr8k by a trained model.

    Args:
        run: Run directory.
        data: ``karpathy:PATH``.
        cache: An ``.npz`` file, read if it is there and written otherwise.

    Returns:
        Images of the training and validation splits, float32 ``(7000, D)``, and captions of the validation split,
        float32 ``(5000, D)``.
    """
    if not cache.exists():
        from training.data.formats import load_corpus
        from training.models.dual_encoder import DualEncoder
        from training.models.features import encode_corpus

        model = DualEncoder.from_pretrained(run)
        train, _ = encode_corpus(model, load_corpus(data, "train"))
        val, captions = encode_corpus(model, load_corpus(data, "val"))
        np.savez(cache, images=np.concatenate([np.asarray(train), np.asarray(val)]), captions=np.asarray(captions))
    with np.load(cache, allow_pickle=False) as stored:
        return stored["images"].astype(np.float32), stored["captions"].astype(np.float32)


def _exact(gallery: Rows, queries: Rows, k: int) -> tuple[Rows, NDArray[np.int64]]:
    flat = faiss.IndexFlatIP(gallery.shape[1])
    flat.add(gallery)
    scores, ids = flat.search(queries, k)
    return scores, ids


def _intrinsic_dimension(scores: Rows) -> float:
    """Levina and Bickel's maximum-likelihood estimate from cosines to nearest neighbours, float32 ``(Q, k)``."""
    distance = np.sqrt(np.maximum(2 - 2 * scores.astype(np.float64), 1e-9))
    return float(1 / np.log(distance[:, -1:] / distance[:, :-1]).mean())  # harmonic mean over rows


def statistics(gallery: Rows, queries: Rows, sample: int = 1000, seed: int = 0) -> Statistics:
    """Cosines and local dimensions of a gallery and its queries.

    Args:
        gallery: Float32 ``(N, D)``, unit rows.
        queries: Float32 ``(Q, D)``, unit rows.
        sample: Rows of each that are looked at.
        seed: Of the sample.

    Returns:
        Mean cosine of a query to its first and tenth hit and to any row; of a gallery row to its nearest other and to
        any; local intrinsic dimension around gallery rows and around queries (20 neighbours); and, with the gallery
        in ``sqrt(N)`` k-means cells, the fraction of them to probe that holds 98 % of all ten hits.
    """
    random = np.random.default_rng(seed)
    queries = queries[random.permutation(len(queries))[:sample]]
    rows = gallery[random.permutation(len(gallery))[:sample]]
    scores, ids = _exact(gallery, queries, 20)
    around = _exact(gallery, rows, 21)[0][:, 1:]
    kmeans = faiss.Kmeans(gallery.shape[1], int(len(gallery) ** 0.5), niter=10, seed=seed + 1)
    kmeans.train(gallery[random.permutation(len(gallery))[:20_000]])
    cell = _exact(kmeans.centroids, gallery, 1)[1][:, 0]
    rank = np.argsort(_exact(kmeans.centroids, queries, len(kmeans.centroids))[1], axis=1)  # (Q, cells): of each cell
    probes = np.take_along_axis(rank, cell[ids[:, :10]], axis=1) + 1
    return Statistics(
        query_top1=float(scores[:, 0].mean()),
        query_top10=float(scores[:, 9].mean()),
        query_all=float((queries @ rows.T).mean()),
        gallery_top1=float(around[:, 0].mean()),
        gallery_all=float((rows @ rows.T).mean()),
        gallery_dimension=_intrinsic_dimension(around),
        query_dimension=_intrinsic_dimension(scores),
        cells=float(np.quantile(probes, 0.98) / len(kmeans.centroids)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--flickr8k", nargs=3, metavar=("RUN", "DATA", "CACHE"))
    args = parser.parse_args()
    made = {"shifted": shifted(args.count, 512, 2000, seed=0)}
    if args.flickr8k:
        run, data, cache = args.flickr8k
        real = flickr8k(run, data, Path(cache))
        made["shifted, 7,000"] = shifted(len(real[0]), 512, 2000, seed=0)
        made["Flickr8k"] = real
        made["Flickr8k replicated"] = replicated(*real, args.count, noise=1.0, seed=0)
    print(f"{'':20}" + "".join(f"{name:>19}" for name in Statistics._fields))
    for name, (gallery, queries) in made.items():
        print(f"{name:20}" + "".join(f"{value:19.3f}" for value in statistics(gallery, queries)))


if __name__ == "__main__":
    main()
