"""How long each stage of a search takes, as histograms for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

STAGES = {
    "wait": "until the engine is free",
    "embed": "texts and pictures to vectors, a batch at a time",
    "search": "vectors to results, a batch at a time",
    "picture": "reading and shrinking a picture of the gallery, and waiting for that",
}
_SECONDS = tuple(0.0005 * 2**n for n in range(16))  # half a millisecond to 16 s


class Latency:
    """Counters of one server, apart from those of any other in the process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        described = "; ".join(f"{stage}: {text}" for stage, text in STAGES.items())
        self._stages = Histogram(
            "vse_stage_seconds", f"Time per stage ({described})", ["stage"], buckets=_SECONDS, registry=self._registry
        )
        self._requests = Histogram(
            "vse_request_seconds", "Time per request", ["route"], buckets=_SECONDS, registry=self._registry
        )
        self._answers = Counter(
            "vse_answers", "Answers by route and status", ["route", "status"], registry=self._registry
        )
        self.batch = Histogram(
            "vse_batch_queries", "Queries answered together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self._registry
        )
        self.pictures = Gauge("vse_pictures", "Pictures in the gallery", registry=self._registry)

    def observe(self, stage: str, seconds: float) -> None:
        """Count one passage through a stage, a key of :data:`STAGES`."""
        self._stages.labels(stage).observe(seconds)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count what the block takes."""
        started = time.perf_counter()
        yield
        self.observe(stage, time.perf_counter() - started)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer to a request."""
        self._requests.labels(route).observe(seconds)
        self._answers.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
