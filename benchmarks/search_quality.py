"""OMP_NUM_THREADS=1 python -m benchmarks.search_quality EMBEDDINGS.npz [--run RUN --data DATA] [--json FILE]

Does a calibrated cut tell relevant results from others, and does hubness correction help? Captions look for their
image among those of the validation split. Each has one relevant image; all others count as wrong, also those that it
happens to describe. Everything is chosen with the captions of one half of the images and measured with those of the
other half, for five random halvings. EMBEDDINGS.npz is made from RUN and DATA if it is not there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.calibration import Calibration, best_f1_cut, fit_calibration, halves, z_scores
from index.querybank import BETAS, QueryBank, choose_beta, rescore

SEEDS = range(5)
BACKGROUND, GAP_AMONG = 1000, 50
BANKS = (1000, 5000)

Array = NDArray[Any]
Table = dict[str, list[dict[str, float]]]


def embed(file: Path, run: str, data: str) -> None:
    from training.data.formats import load_corpus
    from training.models.dual_encoder import DualEncoder
    from training.models.features import encode_corpus

    model, arrays = DualEncoder.from_pretrained(run), {}
    for split in ("train", "val"):
        corpus = load_corpus(data, split)
        images, captions = encode_corpus(model, corpus)
        arrays |= {f"{split}_images": images.numpy(), f"{split}_captions": captions.numpy()}
        arrays[f"{split}_owner"] = corpus.owner
    np.savez(file, **arrays)


def by_largest_gap(scores: Array) -> Array:
    """Each query keeps what comes before the largest drop among its best 50."""
    best = -np.sort(-scores, axis=1)[:, :GAP_AMONG]
    last = (best[:, :-1] - best[:, 1:]).argmax(axis=1)
    return scores >= np.take_along_axis(best, last[:, None], axis=1)


def counted(kept: Array, relevant: Array) -> dict[str, float]:
    found = int((kept & relevant).sum())
    return {
        "precision": found / max(int(kept.sum()), 1),
        "recall": found / int(relevant.sum()),
        "f1": 2 * found / int(kept.sum() + relevant.sum()),
        "kept": float(kept.sum(axis=1).mean()),
        "kept without": float(kept[~relevant.any(axis=1)].sum(axis=1).mean()) if not relevant.any(axis=1).all() else 0,
    }


def in_competition(calibration: Calibration, z: Array) -> Array:
    """Posterior of the one relevant image if there is exactly one: likelihood ratios that sum to 1."""
    ratio = np.exp(calibration.slope * (z - z.max(axis=1, keepdims=True)))
    return ratio / ratio.sum(axis=1, keepdims=True)


def cuts(scores: Array, z: Array, owner: Array) -> dict[str, Table]:
    """All images of the other half in the gallery, and half of them removed, so that half the captions have none."""
    tables: dict[str, Table] = {"every caption has its image": {}, "half of the captions have none": {}}
    for seed in SEEDS:
        fitted, (captions, images, _) = halves(owner, z.shape[1], seed)
        pairs = np.ix_(*fitted[:2])
        # The logistic of a raw score has the same cut as a flat threshold; it tells what z adds.
        flat, standard = fit_calibration(scores[pairs], fitted[2]), fit_calibration(z[pairs], fitted[2])
        cut_of_one = best_f1_cut(in_competition(standard, z[pairs]), fitted[2][:, None] == np.arange(len(fitted[1])))
        kept_images = np.random.default_rng(seed).permutation(images)[: len(images) // 2]
        for table, present in zip(tables.values(), (images, kept_images), strict=True):
            relevant = owner[captions][:, None] == present  # (Q, N)
            seen, seen_z = scores[np.ix_(captions, present)], z[np.ix_(captions, present)]
            for name, kept in (
                ("largest gap in the top 50", by_largest_gap(seen)),
                ("always the best one", seen == seen.max(axis=1, keepdims=True)),
                ("flat threshold on the score", flat.probabilities(seen, len(present)) >= flat.cut),
                ("calibrated z", standard.probabilities(seen_z, len(present)) >= standard.cut),
                ("softmax of z: exactly one is relevant", in_competition(standard, seen_z) >= cut_of_one),
            ):
                table.setdefault(name, []).append(counted(kept, relevant))
    return tables


def transfer(scores: Array, z: Array, captions: Array, owner: Array) -> Table:
    """What was fitted for captions and images is asked about captions and other captions, one for each image."""
    first = np.unique(owner, return_index=True)[1]
    rest = np.setdiff1d(np.arange(len(owner)), first)
    among_captions = captions[rest] @ captions[first].T
    table: Table = {}
    for seed in SEEDS:
        fitted, other = halves(owner, len(first), seed)
        asked = np.isin(rest, other[0])
        own = np.searchsorted(other[1], owner[rest[asked]])
        target = among_captions[np.ix_(asked, other[1])]
        for name, values, target_values in (("raw score", scores, target), ("z", z, z_scores(target, target))):
            calibration = fit_calibration(values[np.ix_(*fitted[:2])], fitted[2])
            same = calibration.measure(values[np.ix_(*other[:2])], other[2])
            changed = calibration.measure(target_values, own)
            table.setdefault(f"{name}, text to image", []).append(asdict(same))
            table.setdefault(f"{name}, text to text", []).append(asdict(changed))
    return table


def size_shift(z: Array, distractors: Array, owner: Array) -> Table:
    """Fit in a gallery of one size, measure other captions in one of another, with and without the correction."""
    table: Table = {}
    for seed in SEEDS:
        fitted, other = halves(owner, z.shape[1], seed)
        seen = z[other[0]]
        half = fit_calibration(z[np.ix_(*fitted[:2])], fitted[2])
        whole = fit_calibration(z[fitted[0]], owner[fitted[0]])
        for calibration, size, target, own in (
            (half, len(fitted[1]), seen[:, other[1]], other[2]),
            (half, len(fitted[1]), seen, owner[other[0]]),
            (half, len(fitted[1]), np.hstack([seen, distractors[other[0]]]), owner[other[0]]),
            (whole, z.shape[1], seen[:, other[1]], other[2]),
        ):
            images = target.shape[1]
            blind = replace(calibration, offset=calibration.offset + math.log((images - 1) / (size - 1)))
            for name, used in (("corrected", calibration), ("uncorrected", blind)):
                table.setdefault(f"{size:,} -> {images:,}, {name}", []).append(asdict(used.measure(target, own)))
    return table


def recalls(scores: Array, owner: Array) -> dict[str, float]:
    ranks = (scores >= scores[np.arange(len(owner)), owner][:, None]).sum(axis=1)
    return {f"R@{k}": 100 * float((ranks <= k).mean()) for k in (1, 5, 10)}


def hubness(images: Array, captions: Array, owner: Array, train_captions: Array) -> Table:
    """Captions of one half choose beta, those of the other are judged; all search all images."""
    scores = captions @ images.T
    table: Table = {}
    for seed in SEEDS:
        chosen_by, judged = (half[0] for half in halves(owner, len(images), seed))
        plain = recalls(scores[judged], owner[judged])
        table.setdefault("plain", []).append(plain)
        for size in BANKS:
            bank = np.random.default_rng(seed).permutation(train_captions)[:size]
            for kind in ("inverted softmax", "dynamic inverted softmax"):
                dynamic = kind.startswith("dynamic")
                activated = QueryBank(bank, 1).activated(images) if dynamic else None
                by_beta = {None: plain} | {
                    beta: recalls(
                        rescore(scores[judged], QueryBank(bank, beta).hubness(images), activated), owner[judged]
                    )
                    for beta in BETAS
                }
                beta = choose_beta(bank, captions[chosen_by], images, owner[chosen_by], dynamic=dynamic)
                row = by_beta[beta] | {"R@1 gained": by_beta[beta]["R@1"] - plain["R@1"], "beta": beta or 0}
                row |= {f"R@1, beta {tried:g}": by_beta[tried]["R@1"] for tried in BETAS}
                table.setdefault(f"{kind}, bank of {size:,}", []).append(row)
    return table


def summary(rows: Iterable[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the halvings."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    return {
        key: {"mean": round(float(np.mean(v)), 6), "sd": round(float(np.std(v, ddof=1)), 6)}
        for key, v in columns.items()
    }


def print_table(title: str, table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    columns = list(dict.fromkeys(key for row in table.values() for key in row))
    print(f"\n{title:42}" + "".join(f"{column:>16}" for column in columns))
    for name, row in table.items():
        cells = (f"{row[key]['mean']:.4g} ± {row[key]['sd']:.2g}" if key in row else "" for key in columns)
        print(f"{name:42}" + "".join(f"{cell:>16}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("embeddings", type=Path)
    parser.add_argument("--run")
    parser.add_argument("--data")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.embeddings.exists():
        embed(args.embeddings, args.run, args.data)
    with np.load(args.embeddings, allow_pickle=False) as arrays:
        images, captions, owner = arrays["val_images"], arrays["val_captions"], arrays["val_owner"]
        train_images, train_captions = arrays["train_images"], arrays["train_captions"]
    scores = captions @ images.T
    background = scores[:, np.random.default_rng(0).permutation(len(images))[:BACKGROUND]]
    z = z_scores(scores, background)
    found = {
        **cuts(scores, z, owner),
        "fitted on text to image": transfer(scores, z, captions, owner),
        "fit -> measured in a gallery of": size_shift(z, z_scores(captions @ train_images.T, background), owner),
        "text to image, %": hubness(images, captions, owner, train_captions),
    }
    tables = {title: {name: summary(rows) for name, rows in table.items()} for title, table in found.items()}
    print(f"{len(images):,} images, {len(captions):,} captions; mean ± sd over {len(SEEDS)} halvings")
    for title, table in tables.items():
        print_table(title, table)
    if args.json:
        counts = {
            "split": "val",
            "images": len(images),
            "captions": len(captions),
            "train_captions": len(train_captions),
        }
        text = json.dumps({**counts, "halvings": len(SEEDS), "tables": tables}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
