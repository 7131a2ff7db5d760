"""What Prometheus reads: how long the queue is, where the time goes, what was answered.

No prompt, no path of a file and no client is in a label, so their number is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # among others process_resident_memory_bytes
        self.requests = Counter(
            "reifusion_requests", "Requests that were answered.", ["route", "code"], registry=self._registry
        )
        self.pictures = Counter("reifusion_pictures", "Pictures that were drawn.", registry=self._registry)
        self.jobs = Counter("reifusion_jobs", "Jobs that ended.", ["state"], registry=self._registry)
        self._stages = Histogram(
            "reifusion_stage_seconds", "Seconds by part: queue, load, sample, decode, encode.",
            ["stage"], buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._waiting = Gauge("reifusion_queue_depth", "Jobs that wait.", registry=self._registry)
        self._drawing = Gauge("reifusion_drawing", "1 while a job is drawn.", registry=self._registry)

    def watch(self, waiting: Callable[[], float], drawing: Callable[[], float]) -> None:
        """Reads the state of the queue from these whenever Prometheus asks."""
        self._waiting.set_function(waiting)
        self._drawing.set_function(drawing)

    def took(self, stage: str, seconds: float) -> None:
        self._stages.labels(stage).observe(seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the seconds of a part."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.took(name, time.monotonic() - begun)

    def text(self) -> bytes:
        """Returns all numbers in Prometheus' format."""
        return generate_latest(self._registry)
