"""The audit of a model: every threat on a seeded subset of a corpus, in parts that survive a kill, as one record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from training.data.batches import Pixels
from training.data.corpus import Corpus
from training.errors import InputError
from training.files import replacing
from training.models.dual_encoder import DualEncoder
from training.models.features import encode_corpus
from training.robustness import checks, summary
from training.robustness.attack_trials import Trials
from training.robustness.corruptions import CORRUPTIONS, corrupt
from training.robustness.curves import AttackSettings, attack_curve, count_changed, embed_all, smallest_epsilon
from training.robustness.feature_space import certify
from training.robustness.norms import check_radius, parse_norm
from training.robustness.parts import Parts
from training.robustness.retrieval_threats import GalleryImage, QueryImage, QueryText, Threat
from training.robustness.spectrum import radial_spectrum
from training.robustness.text_edits import TextBudget, attack_captions

PICTURE_THREATS = ("query-image", "gallery-owner", "gallery-promote")
THREATS = (*PICTURE_THREATS, "query-text", "corruption")
FORMAT = 4
"""Of the parts: grows with what they record, so that older ones are not taken over."""
CHUNK = 20
"""Queries that are attacked together, and lost together when the process is killed."""
SHOWN = 2
"""Worst flips whose pictures are kept, of every chunk."""
COLLAPSED = 1e-3
"""Standard deviation of the scores of one caption, or one picture, below which a model tells nothing apart."""


@dataclass(frozen=True)
class AuditConfig:
    """What to audit and how hard.

    Attributes:
        threats: Names from :data:`THREATS`.
        queries: Images in the subset, of ``query-image``; all, if there are fewer.
        others: Images in the subset, of every other threat; captions of ``query-text``.
        epsilons: Radii, ascending, above 0.
        norm: Name of the norm; see :func:`~training.robustness.norms.parse_norm`.
        steps: Most gradient steps per picture and ε.
        strong: See :class:`~training.robustness.curves.AttackSettings`.
        trials: Queries on which the attack itself is checked.
        severities: Of the corruptions.
        text: Edits of ``query-text``.
        seed: Decides the subset and everything random.

    Raises:
        InputError: For an unknown threat, no queries, or radii that are not ascending or outside (0, 1] in ℓ∞.
    """

    threats: tuple[str, ...] = THREATS
    queries: int = 200
    others: int = 25
    epsilons: tuple[float, ...] = (0.5 / 255, 1 / 255, 2 / 255, 4 / 255, 8 / 255)
    norm: str = "linf"
    steps: int = 50
    strong: bool = False
    trials: int = 12
    severities: tuple[int, ...] = (1, 3, 5)
    text: TextBudget = field(default_factory=TextBudget)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.threats:
            if name not in THREATS:
                raise InputError(f"threat {name!r} is unknown; choose from {', '.join(THREATS)} or all")
        if min(self.queries, self.others, self.steps, self.trials) < 1:
            raise InputError("audit: queries, steps and trials must be at least 1")
        if not self.epsilons or list(self.epsilons) != sorted(set(self.epsilons)) or not self.epsilons[0] > 0:
            raise InputError("audit: give radii above 0 in ascending order; ε = 0 is always there")
        check_radius(self.norm, self.epsilons[-1])


class Audit:
    """One audit, resumable: what was finished before a kill is read back, and the record comes out the same.

    Args:
        model: What is audited; its weights are frozen and it is put in evaluation mode, for good.
        corpus: The whole gallery, with its captions.
        config: What to do.
        out: Folder for parts and, later, the report.
        synonyms: For word edits of ``query-text``.

    Raises:
        InputError: For a model that sees no pictures or has collapsed, a gallery of one image, or a folder that holds
            another audit.
    """

    def __init__(
        self,
        model: DualEncoder,
        corpus: Corpus,
        config: AuditConfig,
        out: Path,
        synonyms: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        transform = model.transform()  # refuses towers that take features
        if not corpus.images:
            raise InputError(f"{corpus.name}: holds features, not pictures; audit on pictures")
        self.model, self.corpus, self.config, self.out = model.eval().requires_grad_(False), corpus, config, out
        self.synonyms = synonyms
        self.pixels = Pixels(corpus.images, transform)
        self.settings = AttackSettings(
            parse_norm(config.norm),
            steps=config.steps,
            strong=config.strong,
            seed=config.seed,
            batch_size=8 if model.device.type == "cpu" else 64,
        )
        identity = {
            "format": FORMAT,
            "settings": asdict(config),
            "weights": model.fingerprint(),
            "images": corpus.fingerprint("image"),
            "captions": corpus.fingerprint("text"),
            "synonyms": {word: list(others) for word, others in (synonyms or {}).items()},
        }
        order = np.random.default_rng(config.seed).permutation(len(corpus.image_ids))
        self.order: list[int] = order.tolist()
        self.queries, self.others = self.order[: config.queries], self.order[: config.others]
        images, captions = encode_corpus(model, corpus)
        self.images, self.captions = images.to(model.device), captions.to(model.device)
        self._refuse_collapse()
        self.settings.norm.measure(self._fetch(self.order[:1]))  # refuses a band without a frequency of such pictures
        self.parts = Parts(out / "parts", identity)

    def run(self) -> dict[str, Any]:
        """Everything, as a record ready for JSON."""
        started = time.monotonic()
        plan = self._plan()
        asked = "query-image" in plan
        self.parts.expect(sum(map(len, plan.values())) + 1 + asked)
        parts = {name: [self.parts.get(*part) for part in plan[name]] for name in self.config.threats}
        threats = {name: self._summarise(name, of) for name, of in parts.items()}
        checked = partial(self._checks, parts.get("query-image", []), threats)
        verdicts = self.parts.get("checks", checked) if asked else []
        certificates = self.parts.get("certificates", self._certificates)
        self.parts.bar.close()
        return {
            "data": self.corpus.name,
            "split": self.corpus.split,
            "images": len(self.corpus.image_ids),
            "captions": len(self.corpus.captions),
            "model": self.model.fingerprint(),
            "config": asdict(self.config),
            "trustworthy": all(verdict["passed"] for verdict in verdicts) if verdicts else None,
            "checks": verdicts,
            "threats": threats,
            "certificates": certificates,
            "seconds": round(time.monotonic() - started, 1),
        }

    def _plan(self) -> dict[str, list[tuple[str, Callable[[], Any]]]]:
        """For each threat its parts, by name."""
        plan: dict[str, list[tuple[str, Callable[[], Any]]]] = {}
        for name in self.config.threats:
            rows = self.queries if name == "query-image" else self.others
            work = {"query-text": self._text, "corruption": self._corruptions}.get(name)
            chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
            plan[name] = [
                (f"{name}-{number:03}", partial(work, chunk) if work else partial(self._picture, name, chunk, number))
                for number, chunk in enumerate(chunks)
            ]
        return plan

    def _fetch(self, rows: Sequence[int]) -> Tensor:
        return self.pixels.fetch(np.asarray(rows), None).values.to(self.model.device).float() / 255

    def picture(self, row: int) -> Tensor:
        """A picture of the corpus as the image tower takes it: float32 ``(3, S, S)`` in [0, 1], on the CPU."""
        return self._fetch([row])[0].cpu()

    def threat(self, name: str, rows: Sequence[int], images: Tensor) -> Threat:
        """The threat of that name to pictures ``(n, 3, S, S)`` of the corpus."""
        embed, similarity = self.model.image_tower, self.model.similarity
        if name == "query-image":
            clean = torch.cat([self._embed(part) for part in images.split(self.settings.batch_size)])  # type: ignore[no-untyped-call]
            return QueryImage.of(embed, similarity, self.captions, self.corpus.owner, rows, clean)
        promote = name == "gallery-promote"
        searches = [[self._other_caption(row)] if promote else self._own_captions(row) for row in rows]
        return GalleryImage.of(embed, similarity, self.images, self.captions, rows, searches, promote)

    @torch.no_grad()
    def _embed(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.model.image_tower(images)
        return embeddings

    def _own_captions(self, image: int) -> list[int]:
        found: list[int] = np.flatnonzero(self.corpus.owner == image).tolist()
        return found

    def _other_caption(self, image: int) -> int:
        """The caption of another picture for which this one is to be promoted: drawn once, by seed and image."""
        others = np.flatnonzero(self.corpus.owner != image)
        return int(np.random.default_rng((self.config.seed, image)).choice(others))

    def _picture(self, name: str, rows: list[int], number: int) -> dict[str, Any]:
        images = self._fetch(rows)
        threat = self.threat(name, rows, images)
        curve = attack_curve(threat, images, self.config.epsilons, self.settings)
        record: dict[str, Any] = {
            "rows": rows,
            "ranks": curve.ranks.tolist(),
            "rounded": curve.rounded.tolist(),
            "changed": curve.changed.tolist(),
            "violation": curve.violation,
            "flat": curve.flat,
            "passes": curve.passes,
        }
        if isinstance(threat, QueryImage):
            record["epsilon50"] = smallest_epsilon(threat, images, curve, self.settings).tolist()
            record["cosines"] = [self._extremes(threat, points) for points in curve.points]
            record["spectra"] = [
                [values.tolist() for values in radial_spectrum(points - images)] for points in curve.points
            ]
            record["flips"] = self._keep_flips(threat, curve.ranks, curve.points, f"{name}-{number:03}", rows)
        return record

    @torch.no_grad()
    def _extremes(self, threat: QueryImage, points: Tensor) -> list[list[float]]:
        """Score of the best own caption and of the best other one, for each picture."""
        scores = threat.similarity.scores(embed_all(threat, points, self.settings.batch_size), threat.gallery)
        own = scores.masked_fill(~threat.own, -torch.inf).amax(1)
        other = scores.masked_fill(threat.own, -torch.inf).amax(1)
        return torch.stack([own, other], 1).tolist()

    @property
    def shown_epsilon(self) -> int:
        """Place on the curve, counted from ε = 0, of the radius whose flips are shown: the first of at least 2/255."""
        large = [place for place, epsilon in enumerate(self.config.epsilons, 1) if epsilon >= 2 / 255 - 1e-9]
        return large[0] if large and self.config.norm == "linf" else (len(self.config.epsilons) + 1) // 2

    def _keep_flips(
        self, threat: QueryImage, ranks: NDArray[np.int64], points: list[Tensor], name: str, rows: list[int]
    ) -> list[dict[str, Any]]:
        """The clean hits that fell furthest: their perturbed pictures go to a file, what they find to the record."""
        place = self.shown_epsilon
        clean, fallen = ranks[0, :, 0], ranks[place, :, 0]
        order = [int(row) for row in np.argsort(-fallen, kind="stable") if clean[row] == 0 and fallen[row] > 0]
        kept = order[:SHOWN]
        if not kept:
            return []
        chosen = torch.tensor(kept, device=points[0].device)
        with replacing(self.out / "parts" / f"{name}.safetensors") as temporary:
            temporary.write_bytes(save({"adversarial": points[place][chosen].cpu().contiguous()}))
        found = []
        with torch.no_grad():
            for number, row in enumerate(kept):
                pair = torch.stack([points[0][row], points[place][row]])
                best = threat.similarity.scores(self._embed(pair), threat.gallery).topk(3).indices.tolist()
                before, after = ([self.corpus.captions[c] for c in captions] for captions in best)
                found.append(
                    {
                        "image": self.corpus.image_ids[rows[row]],
                        "row": rows[row],
                        "file": f"{name}.safetensors",
                        "place": number,
                        "epsilon": self.config.epsilons[place - 1],
                        "rank": int(fallen[row]),
                        "before": before,
                        "after": after,
                    }
                )
        return found

    def _text(self, rows: list[int]) -> dict[str, Any]:
        captions = [self._own_captions(row)[0] for row in rows]
        texts = [self.corpus.captions[c] for c in captions]
        owner = self.corpus.owner[captions]
        threat = QueryText(self.model.encode_texts, self.model.similarity, self.images, owner)
        found = attack_captions(texts, threat.margins, self.config.text, self.synonyms, seed=self.config.seed)
        return {
            "rows": [self.corpus.caption_ids[c] for c in captions],
            "ranks": [threat.ranks(texts).tolist(), threat.ranks(found.captions).tolist()],
            "texts": [list(pair) for pair in zip(texts, found.captions, strict=True)],
            "edits": np.asarray(found.edits).tolist(),
            "editable": int(found.editable.sum()),
            "queries": int(found.queries),
        }

    def _corruptions(self, rows: list[int]) -> dict[str, Any]:
        images = self._fetch(rows)
        threat = self.threat("query-image", rows, images)
        ranks = {"clean": {"0": threat.ranks(embed_all(threat, images, self.settings.batch_size)).tolist()}}
        changed: dict[str, dict[str, int]] = {}
        for name in CORRUPTIONS:
            ranks[name], changed[name] = {}, {}
            for severity in self.config.severities:
                # The row in the corpus decides the noise, so a chunk's size does not.
                worse = torch.cat(
                    [
                        corrupt(image[None], name, severity, self.config.seed, first=row)
                        for row, image in zip(rows, images, strict=True)
                    ]
                )
                ranks[name][str(severity)] = threat.ranks(embed_all(threat, worse, self.settings.batch_size)).tolist()
                # In grey levels: rounding by a filter that does nothing is no corruption.
                changed[name][str(severity)] = count_changed((worse * 255).round(), (images * 255).round())
        return {"rows": rows, "ranks": ranks, "changed": changed}

    def _summarise(self, name: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        ids = [row if isinstance(row, str) else self.corpus.image_ids[row] for part in parts for row in part["rows"]]
        return summary.threat(name, parts, ids, (0.0, *self.config.epsilons))

    def _checks(self, parts: list[dict[str, Any]], threats: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """All fourteen: on what became of the query-image threat, the last on every threat."""
        ranks = summary.join([part["ranks"] for part in parts])[..., 0]  # (E + 1, N)
        hits = ranks[0] == 0
        rates = [summary.percent(int((row[hits] > 0).sum()), max(int(hits.sum()), 1)) for row in ranks]
        place = int(np.argmin(np.abs(np.asarray(rates[1:]) - 50))) + 1  # where the attack is neither sure nor hopeless
        epsilon = self.config.epsilons[place - 1]

        clean_hits = [self.queries[row] for row in np.flatnonzero(hits)] or self.queries
        chosen = clean_hits[: self.config.trials]
        trials = self._trials(chosen, epsilon)
        standing = np.flatnonzero(hits & (ranks[place] == 0))
        tried = [self.queries[row] for row in standing[: max(self.config.trials // 2, 1)]]
        images = self._fetch(self.queries[:CHUNK])
        encoded = self.model.encode("image", self.pixels_of(self.queries[:CHUNK]), self.settings.batch_size)
        threat = self.threat("query-image", self.queries[:CHUNK], images)
        found = [
            checks.zero_changes_nothing(threat.ranks(encoded.to(images.device))[:, 0], ranks[0, : len(images)]),
            checks.success_grows((0.0, *self.config.epsilons), rates),
            *trials.run(),
            *self._trials(tried or chosen[:1], epsilon).persistence(
                torch.arange(len(tried), device=images.device), int(hits.sum()), len(standing)
            ),
            checks.gradients_are_alive(sum(part["flat"] for part in parts), len(ranks[0])),
            checks.perturbations_stay_inside(max(part["violation"] for part in parts)),
            checks.threats_change_something({name: summary.unchanged(of) for name, of in threats.items()}),
        ]
        return [asdict(check) for check in sorted(found, key=lambda check: check.number)]

    def pixels_of(self, rows: Sequence[int]) -> Pixels:
        """Some pictures of the corpus as the image tower takes them."""
        return Pixels([self.corpus.images[row] for row in rows], self.model.transform())

    def _trials(self, rows: list[int], epsilon: float) -> Trials:
        images = self._fetch(rows)
        threat = self.threat("query-image", rows, images)
        assert isinstance(threat, QueryImage)
        return Trials(threat, images, self.model.image_tower, self.settings, epsilon)

    def _certificates(self) -> dict[str, Any]:
        with torch.no_grad():
            chunks = [self.queries[start : start + CHUNK] for start in range(0, len(self.queries), CHUNK)]
            features = torch.cat([self.model.image_tower.features(self._fetch(rows)).values for rows in chunks])
        own = torch.from_numpy(np.asarray(self.queries)[:, None] == self.corpus.owner[None])
        return certify(self.model, features, self.captions, own, seed=self.config.seed)

    def _refuse_collapse(self) -> None:
        if len(self.images) < 2:
            raise InputError(f"{self.corpus.name} [{self.corpus.split}]: one image has no competitors; audit on more")
        with torch.no_grad():
            scores = self.model.similarity.scores(self.images[:200], self.captions[:1000])
        for side, spread in (("images", float(scores.std(0).mean())), ("captions", float(scores.std(1).mean()))):
            if not spread > COLLAPSED:
                raise InputError(
                    f"the model has collapsed: it tells no {side} apart (scores differ by {spread:.1e}); "
                    "train another before auditing"
                )
