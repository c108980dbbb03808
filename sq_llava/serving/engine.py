"""The thread that generates: it takes requests as they arrive, and delivers their text token by token.

    >>> with Engine(assistant, max_batch_size=16) as engine:
    ...     engine.submit(Generation(prompt, sampling, num_rows=1, deliver=print))

Between two tokens, waiting requests join the batch in the order of their arrival, as long as there is room. Cancelled
requests leave it.
"""

import copy
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sq_llava.inference.assistant import Assistant
from sq_llava.serving.decoding import Batch, Prompt, Row, Sampling


logger = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Piece:
    """
    New text of one row.

    Args:
        index (`int`): Number of the row within its request.
        num_tokens (`int`): Number of tokens of the row so far.
        finish_reason (`str`, *optional*): `stop` or `length` if the row has ended.
    """

    index: int
    text: str
    num_tokens: int
    finish_reason: str | None


@dataclass(frozen=True)
class Failure:
    """Tells a request that its generation failed."""

    message: str


@dataclass(eq=False)
class Generation:
    """
    One request: a prompt, and how many rows to generate for it.

    Args:
        deliver (`Callable`): Called in the engine's thread with each [`Piece`] or a [`Failure`]. Must return at once.
    """

    prompt: Prompt
    sampling: Sampling
    num_rows: int
    deliver: Callable[[Piece | Failure], None]
    is_cancelled: bool = False
    rows: list[Row] = field(default_factory=list)

    def cancel(self) -> None:
        """Stops the generation before its next token. May be called from any thread."""
        self.is_cancelled = True


class Engine:
    """
    Args:
        assistant (`Assistant`): While the engine runs, no other thread may use its model.
        max_batch_size (`int`): Maximum number of rows that are generated at the same time.

    Raises:
        ValueError: if a [`Batch`] does not support the model or a setting in its generation_config.json.
    """

    def __init__(self, assistant: Assistant, max_batch_size: int):
        self.max_batch_size = max_batch_size
        self.device = assistant.model.device
        # A copy: a fast tokenizer cannot decode in one thread while it encodes in another.
        self.tokenizer = copy.deepcopy(assistant.processor.tokenizer)
        self.batch = Batch(assistant.model)
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.is_closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="generation", daemon=True)
        # A trial step: a model that cannot be batched fails here, and not at the first request.
        row = Row.begin(Sampling(max_new_tokens=2), 0, self.tokenizer, self.device)
        self.batch.join([Prompt([self.tokenizer.eos_token_id])], [[row]])
        self.batch.step()
        self.batch.keep([])

    def __enter__(self) -> "Engine":
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        """Finishes all submitted requests, and ends the thread."""
        with self.changed:
            self.is_closed = True
            self.changed.notify()
        self.thread.join()

    @property
    def num_running(self) -> int:
        return len(self.batch.rows)

    def submit(self, generation: Generation) -> None:
        """
        Adds a request to the queue.

        Raises:
            ValueError: if it has more rows than fit into a batch.
        """
        if generation.num_rows > self.max_batch_size:
            raise ValueError(f"n is {generation.num_rows}: this server generates at most {self.max_batch_size} texts.")
        with self.changed:
            self.waiting.append(generation)
            self.changed.notify()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.running or self.is_closed)
                if self.is_closed and not self.waiting and not self.running:
                    return
                joining = self._take_waiting()
            # After any error with some requests (e.g. out of memory), the others must be served.
            try:
                self._join(joining)
            except Exception:
                _fail(joining)
            try:
                self._advance()
            except Exception:
                _fail(self.running)
                self.running = []
                self.batch = Batch(self.batch.model)

    def _take_waiting(self) -> list[Generation]:
        self.waiting = deque(generation for generation in self.waiting if not generation.is_cancelled)
        joining, room = [], self.max_batch_size - len(self.batch.rows)
        while self.waiting and self.waiting[0].num_rows <= room:
            generation = self.waiting.popleft()
            joining.append(generation)
            room -= generation.num_rows
        return joining

    def _join(self, joining: list[Generation]) -> None:
        for generation in joining:
            generation.rows = [
                Row.begin(generation.sampling, index, self.tokenizer, self.device)
                for index in range(generation.num_rows)
            ]
        self.batch.join([generation.prompt for generation in joining], [generation.rows for generation in joining])
        self.running += joining

    def _advance(self) -> None:
        self.running = [generation for generation in self.running if not generation.is_cancelled]
        wanted = {row for generation in self.running for row in generation.rows}
        self.batch.keep([index for index, row in enumerate(self.batch.rows) if row in wanted])
        if self.batch.rows:
            stepped = set(self.batch.step())
            for generation in self.running:
                for index, row in enumerate(generation.rows):
                    if row in stepped:
                        text = row.text.take(row.finish_reason is not None)
                        generation.deliver(Piece(index, text, row.num_tokens, row.finish_reason))
            self.running = [
                generation for generation in self.running if any(row.finish_reason is None for row in generation.rows)
            ]


def _fail(generations: list[Generation]) -> None:
    """Logs the error that is being handled, and tells these requests that they failed."""
    logger.exception("Generation failed. %d requests get an error.", len(generations))
    for generation in generations:
        generation.deliver(Failure("The model failed on this request."))
