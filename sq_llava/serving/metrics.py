"""The metrics at /metrics, for Prometheus: requests, tokens, times, and the current load."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sq_llava.serving.engine import Engine, Piece


class Metrics:
    """The metrics of one server. Clients cannot choose the value of a label."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        settings = {"registry": self.registry}
        self.requests = Counter("sq_llava_requests", "Chat completions by HTTP status.", ["status"], **settings)
        self.seconds = Histogram(
            "sq_llava_request_seconds", "Time from the start of a request to its end.", **settings
        )
        self.first_seconds = Histogram(
            "sq_llava_first_token_seconds", "Time from queueing to the first token.", **settings
        )
        self.tokens = Counter("sq_llava_generated_tokens", "Number of generated tokens.", **settings)
        self.under_way = Gauge("sq_llava_requests_under_way", "Requests in progress.", **settings)
        running = Gauge("sq_llava_rows_running", "Texts that are being generated.", **settings)
        running.set_function(lambda: engine.num_running)
        waiting = Gauge("sq_llava_requests_waiting", "Requests waiting for room in the batch.", **settings)
        waiting.set_function(lambda: len(engine.waiting))

    def count_piece(self, piece: Piece, started: float) -> None:
        self.tokens.inc()
        if piece.num_tokens == 1:
            self.first_seconds.observe(time.monotonic() - started)

    def text(self) -> bytes:
        return generate_latest(self.registry)
