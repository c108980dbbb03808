"""The visitors' line for the model: one piece of work runs at a time, in the order of the clicks. No Gradio here.

>>> for step in Line().follow(reply(assistant, turns, settings), stopped=Event()):
...     print(step)  # what `reply` yields, or `Waiting` while nothing new is there
"""

import time
from collections.abc import Iterator
from contextlib import closing
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple


# Seconds after which a look is taken whether a visitor has stopped the work, or whose turn it is.
TICK = 0.1
END = object()


class Waiting(NamedTuple):
    """Nothing new for so many whole `seconds`. `ahead` is the number of requests that come first."""

    ahead: int
    seconds: int


class LineIsFull(Exception):
    """So many requests wait for the model that no more are let in."""


class Line:
    """
    Args:
        longest (`int`): Maximum number of pieces of work, with the one that runs.
    """

    def __init__(self, longest: int = 32):
        self.longest = longest
        # The first one has the model.
        self.tickets: list[object] = []

    def follow(self, steps: Iterator[Any], stopped: Event) -> Iterator[Any]:
        """
        Runs `steps` in a thread when its turn comes. It ends `TICK` seconds after `stopped` is set, also while the
        model still works on its next word. The next request then waits for that word.

        Yields:
            What `steps` yields; [`Waiting`] once at the start, and for each second in which nothing comes.

        Raises:
            LineIsFull: if too many requests wait.
        """
        if len(self.tickets) >= self.longest:
            raise LineIsFull(f"{self.longest} requests wait for the model already. Try again in a minute.")
        ticket, results = object(), SimpleQueue()
        self.tickets.append(ticket)
        Thread(target=self._work, args=(ticket, steps, results, stopped), daemon=True).start()
        shown, since = None, time.monotonic()
        try:
            while not stopped.is_set():
                try:
                    result = results.get(timeout=TICK)
                except Empty:
                    tickets = [*self.tickets]  # another thread may change it
                    ahead = tickets.index(ticket) if ticket in tickets else 0
                    waiting = Waiting(ahead, int(time.monotonic() - since))
                    if waiting != shown:
                        yield waiting
                    shown = waiting
                    continue
                if result is END:
                    return
                if isinstance(result, Exception):
                    raise result
                yield result
                shown, since = None, time.monotonic()
        finally:
            stopped.set()

    def _work(self, ticket: object, steps: Iterator[Any], results: SimpleQueue, stopped: Event) -> None:
        try:
            while self.tickets[0] is not ticket and not stopped.wait(TICK):
                pass
            with closing(steps):
                while not stopped.is_set() and (step := next(steps, END)) is not END:
                    results.put(step)
            results.put(END)
        except Exception as error:
            results.put(error)
        finally:
            self.tickets.remove(ticket)
