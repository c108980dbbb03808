"""What requests may cost and what they did cost: caps that hold for all runs with the same journal.

    budget = Budget(settings, Journal(path))
    reservation = budget.reserve(prompt_tokens=500, completion_tokens=1024)    # the most that the request can use
    budget.settle(reservation, used=(480, 12))                                 # what the server counted

Before a request is sent, the most that it can use is reserved. So no cap is exceeded, even with many requests under
way, if the server honours the maximum length of an answer. Some servers ignore it. So with a cap on tokens or cost,
the first request goes alone, and a reply that used more than was reserved raises all later reservations in proportion.
"""

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sq_llava.llm_client.journal import Journal
from sq_llava.llm_client.settings import ChatSettings


class ChatStopped(RuntimeError):
    """No more requests: a cap is reached, or the server refuses everything or is gone. Answers are kept."""


@dataclass(frozen=True)
class Spent:
    """What requests used. `cost` is `None` without prices."""

    num_requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def __str__(self) -> str:
        requests = "1 request" if self.num_requests == 1 else f"{self.num_requests:,} requests"
        cost = "" if self.cost is None else f", {money(self.cost)} spent"
        return f"{requests}, {self.prompt_tokens + self.completion_tokens:,} tokens{cost}"


def money(amount: float) -> str:
    return f"{amount:,.2f}" if amount >= 1 else f"{amount:.4f}"


def spent_in(journals: Iterable[Path], settings: ChatSettings) -> Spent:
    """What all requests in several journals used, at the prices in the settings."""
    budgets = [Budget(settings, Journal(path, reads_only=True)).spent for path in journals]
    costs = [each.cost for each in budgets]
    return Spent(
        sum(each.num_requests for each in budgets),
        sum(each.prompt_tokens for each in budgets),
        sum(each.completion_tokens for each in budgets),
        None if settings.input_price is None else sum(costs),
    )


@dataclass(frozen=True)
class Reservation:
    """
    What is set aside for a request under way: the most that it is expected to use after the replies so far. `planned`:
    the prompt and answer tokens that it uses at most if the server keeps the limits.
    """

    tokens: int
    cost: float
    planned: tuple[int, int]


class Budget:
    """
    Enforces the caps, in threads.

    Args:
        settings (`ChatSettings`): Caps and prices.
        journal (`Journal`): What was used before.
        stopping (`threading.Event`, *optional*): Once it is set, no request can be reserved.
    """

    def __init__(self, settings: ChatSettings, journal: Journal, stopping: threading.Event | None = None):
        self._settings = settings
        self._stopping = stopping or threading.Event()
        self._changed = threading.Condition()
        lines = [line for line in journal.all() if "refused" not in line]
        self.num_requests = len(lines)
        self._prompt_tokens = sum(line["prompt_tokens"] for line in lines)
        self._completion_tokens = sum(line["completion_tokens"] for line in lines)
        self._reserved_tokens = 0
        self._reserved_cost = 0.0
        self._num_under_way = 0
        # The largest ratio of what was used to what was planned, for prompts and answers. `None` before a reply.
        self._excess: tuple[float, float] | None = None
        for line in lines:
            reserved = line.get("reserved", {})
            if settings.max_tokens_field in reserved:
                self._learn(_used(line), (reserved["prompt_tokens"], reserved[settings.max_tokens_field]))

    @property
    def spent(self) -> Spent:
        tokens = self._prompt_tokens, self._completion_tokens
        has_prices = self._settings.input_price is not None
        return Spent(self.num_requests, *tokens, self._settings.price(*tokens) if has_prices else None)

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> Reservation:
        """
        Reserves the maximum that a request can use. At a cap, it waits for requests under way, which may cost less.

        Raises:
            ChatStopped: If the request does not fit under a cap and none is under way, or if the run stops.
        """
        with self._changed:
            while True:
                if self._stopping.is_set():
                    raise ChatStopped("the run stops")
                reservation = self._expect(prompt_tokens, completion_tokens)
                reason = self._too_much(reservation)
                if not self._num_under_way:
                    if reason is None:
                        break
                    raise ChatStopped(f"stopped by {reason} Raise this limit and run again: the answers are kept.")
                if reason is None and not self._must_go_alone():
                    break
                self._changed.wait()
            self.num_requests += 1
            self._reserved_tokens += reservation.tokens
            self._reserved_cost += reservation.cost
            self._num_under_way += 1
            return reservation

    def settle(self, reservation: Reservation, used: tuple[int, int] | None) -> None:
        """Replaces the reservation by what was used. A request that the server refused (`used` is `None`) is free."""
        with self._changed:
            self._reserved_tokens -= reservation.tokens
            self._reserved_cost -= reservation.cost
            self._num_under_way -= 1
            if used is None:
                self.num_requests -= 1
            else:
                self._prompt_tokens += used[0]
                self._completion_tokens += used[1]
                self._learn(used, reservation.planned)
            self._changed.notify_all()

    def _learn(self, used: tuple[int, int], planned: tuple[int, int]) -> None:
        ratios = (mine / most for mine, most in zip(used, planned))
        self._excess = tuple(map(max, ratios, self._excess or (1.0, 1.0)))

    def wake(self) -> None:
        """Lets threads that wait for a reservation see that the run stops."""
        with self._changed:
            self._changed.notify_all()

    def _expect(self, *planned: int) -> Reservation:
        tokens = [math.ceil(most * ratio) for most, ratio in zip(planned, self._excess or (1.0, 1.0))]
        return Reservation(sum(tokens), self._settings.price(*tokens), planned)

    def _must_go_alone(self) -> bool:
        is_capped = self._settings.max_cost is not None or self._settings.max_total_tokens is not None
        return is_capped and self._excess is None

    def _too_much(self, wanted: Reservation) -> str | None:
        max_tokens, max_cost = self._settings.max_total_tokens, self._settings.max_cost
        max_requests, prefix = self._settings.max_requests, self._settings.option_prefix
        spent = self.spent
        if max_requests is not None and self.num_requests >= max_requests:
            return f"{prefix}max-requests {max_requests}."
        if max_cost is not None and spent.cost + self._reserved_cost + wanted.cost > max_cost:
            costs = f"{spent.cost:g} is spent, and the next request can cost up to {wanted.cost:g}"
            return f"{prefix}max-cost {max_cost:g}: {costs}.{self._why_more()}"
        tokens = spent.prompt_tokens + spent.completion_tokens
        if max_tokens is not None and tokens + self._reserved_tokens + wanted.tokens > max_tokens:
            used = f"{tokens} are used, and the next request can use up to {wanted.tokens}"
            return f"{prefix}max-total-tokens {max_tokens}: {used}.{self._why_more()}"
        return None

    def _why_more(self) -> str:
        """What to do about a server whose replies used more than was planned."""
        prompts, answers = self._excess or (1.0, 1.0)
        if answers > 1:
            return (
                f" An answer had {answers * self._settings.max_tokens:,.0f} tokens: the server ignores "
                f"{self._settings.max_tokens_field} {self._settings.max_tokens}. {self._settings.other_field}"
            )
        return f" A prompt had {prompts:.1f} times the tokens that were expected." if prompts > 1 else ""


def _used(line: Mapping[str, Any]) -> tuple[int, int]:
    """The tokens of a line of the journal."""
    return line["prompt_tokens"], line["completion_tokens"]
