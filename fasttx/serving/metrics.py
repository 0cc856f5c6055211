"""What a service counts, in Prometheus' format."""

from __future__ import annotations

import os

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
)

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """Of one process; with several workers the page adds them up (PROMETHEUS_MULTIPROC_DIR)."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "fasttx_requests", "Requests answered", ("path", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "fasttx_request_seconds", "From the first byte to the answer", ("path",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.texts = Counter("fasttx_texts", "Texts labelled", ("model",), registry=registry)
        self.tokens = Counter("fasttx_tokens", "Tokens computed", ("model",), registry=registry)
        self.truncated = Counter(
            "fasttx_truncated_texts", "Texts of which a part was not read", ("model",),
            registry=registry,
        )  # fmt: skip
        self.queue_seconds = Histogram(
            "fasttx_queue_seconds", "How long a text waited for its batch", ("model",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.batch_texts = Histogram(
            "fasttx_batch_texts", "Texts in a batch", ("model",), buckets=_SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "fasttx_batch_seconds", "Time to compute a batch", ("model",), buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.failed_batches = Counter(
            "fasttx_failed_batches", "Batches that raised", ("model",), registry=registry
        )
        self.waiting = Gauge(
            "fasttx_waiting_texts", "Texts in the queue", ("model",), registry=registry,
            multiprocess_mode="livesum",
        )  # fmt: skip
        self.reloads = Counter(
            "fasttx_reloads", "Models read again, by outcome", ("model", "outcome"),
            registry=registry,
        )  # fmt: skip
        self.lost_lines = Counter(
            "fasttx_lost_log_lines", "Lines that could not be written", registry=registry
        )

    def page(self) -> bytes:
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        multiprocess.MultiProcessCollector(together)
        return generate_latest(together)
