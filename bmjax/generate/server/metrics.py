"""What the server counts, for Prometheus: requests, tokens, waiting and times, and the process's memory."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from bmjax.generate.server.worker import Asked, Event, Worker

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """The server's counters, in a registry of their own."""

    def __init__(self, worker: Worker, slots: int) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        active = Gauge("bmjax_answers_under_way", "Answers that are generated or wait for a slot", registry=registry)
        active.set_function(lambda: worker.active)
        running = Gauge("bmjax_slots_used", "Answers that are generated, by how many there are", registry=registry)
        running.set_function(lambda: min(worker.active, slots))
        Gauge("bmjax_slots", "Answers that are generated at once", registry=registry).set(slots)
        self.requests = Counter("bmjax_requests", "Requests by path and status", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("bmjax_prompt_tokens", "Tokens of prompts", registry=registry)
        self.answer_tokens = Counter("bmjax_answer_tokens", "Tokens of answers", registry=registry)
        self.answers = Counter("bmjax_answers", "Answers by why they ended", ["finish_reason"], registry=registry)
        self.first = Histogram(
            "bmjax_first_token_seconds", "From the request to its first token", buckets=SECONDS, registry=registry
        )
        self.whole = Histogram(
            "bmjax_answer_seconds", "From the request to the end of an answer", buckets=SECONDS, registry=registry
        )
        self._begun: set[tuple[int, int]] = set()
        worker.observe(self._observe)

    def _observe(self, asked: Asked, event: Event) -> None:
        key, seconds = (id(asked), event.index), time.monotonic() - asked.began
        self.answer_tokens.inc(len(event.tokens))
        if event.tokens and key not in self._begun:
            self._begun.add(key)
            self.first.observe(seconds)
        if event.finish_reason is not None or event.error is not None:
            self._begun.discard(key)
            self.whole.observe(seconds)

    def ended(self, reason: str) -> None:
        """Count an answer by its end as the client is told it; cancelled where the client had left, or error."""
        self.answers.labels(reason).inc()

    def text(self) -> bytes:
        """Return all values in Prometheus' text form."""
        return generate_latest(self.registry)
