"""Replies as real servers send them: which are used, which are paid, and which are sent for again."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sq_llava.llm_client.client import ChatFailure, UnusableAnswer
from sq_llava.llm_client.replies import (
    BROKEN,
    CUT_OFF,
    EMPTY,
    FILTERED,
    REFUSED,
    TOO_LONG,
    read_completion,
    retry_after,
    without_thoughts,
)
from tests.chat_server import Reply, chat_server, completion
from tests.llm_client.clients import ask, client_of, say


pytestmark = pytest.mark.usefixtures("api_key")


def test_odd_characters_of_an_answer_are_kept(tmp_path):
    text = "a\u2028b\u2029c\u0085d"
    said = {"a": text, "b": "half \ud83d of one"}
    with chat_server(lambda request, number: said[request["messages"][-1]["content"]]) as server:
        asked = ask(client_of(server, tmp_path), "a", "b")
        assert asked.results == {"a": text, "b": "half \ufffd of one"}
        assert ask(client_of(server, tmp_path), "a", "b").results == asked.results
    assert len(server.requests) == 2


@given(text=st.text(st.characters(exclude_categories=()), min_size=1).filter(str.strip))
@settings(max_examples=200, deadline=None)
def test_any_text_of_json_can_be_written(text):
    answer = read_completion(completion(text), "writer", (1, 1))["answer"]
    answer.encode()
    whole = json.loads(json.dumps(text))  # two adjacent halves of a surrogate pair become one character
    assert len(answer) == len(whole)
    for ours, theirs in zip(answer, whole):
        assert ours == theirs or (ours == "\ufffd" and "\ud800" <= theirs <= "\udfff")


@pytest.mark.parametrize("zone", ["", " -0000", " GMT", " +0000"])
def test_date_of_retry_after_is_read_with_any_name_of_its_zone(zone):
    later = datetime.now(UTC) + timedelta(seconds=60)
    assert 55 < retry_after(f"{later:%a, %d %b %Y %H:%M:%S}{zone}") <= 60


@pytest.mark.parametrize(
    ("header", "seconds"), [("soon", None), ("-3", 0.0), ("nan", 0.0), ("inf", 120.0), ("7", 7.0)]
)
def test_odd_numbers_of_retry_after_give_sensible_waits(header, seconds):
    assert retry_after(header) == seconds


@pytest.mark.slow
def test_date_of_retry_after_is_waited_for(tmp_path):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=2.5), usegmt=True)  # whole seconds: at least 1.5
    refusal = Reply(status=429, headers={"Retry-After": later}, body="{}")
    with chat_server(lambda request, number: refusal if number == 0 else "1") as server:
        assert client_of(server, tmp_path).complete(say("a")) == "1"
    assert server.times[1] - server.times[0] > 1.0


UNUSABLE = {
    EMPTY: completion(None),
    CUT_OFF: completion("Half of a", finish_reason="length"),
    FILTERED: completion("Half of a", finish_reason="content_filter"),
    REFUSED: completion(None, choices=[{"message": {"content": None, "refusal": "I cannot."}}]),
    BROKEN: completion(None, choices=[], error={"message": "died"}),
    TOO_LONG: completion("a" * 1_000_001),
}


@pytest.mark.parametrize("fault", UNUSABLE)
def test_unusable_reply_is_paid_as_counted_and_only_another_attempt_asks_again(fault, tmp_path):
    def reply(request, number):
        return "1" if request.get("seed") else Reply(body=UNUSABLE[fault])

    with chat_server(reply) as server:
        for _ in range(2):
            client = client_of(server, tmp_path)
            with pytest.raises(UnusableAnswer, match=fault):
                client.complete(say("a"))
            asked = ask(client_of(server, tmp_path), "a")
            assert asked.unusable["a"][0] == fault and not asked.failures and not asked.num_open
        assert len(server.requests) == 1 and str(client.budget.spent) == "1 request, 110 tokens"
        client = client_of(server, tmp_path, attempts=2)
        assert list(client.answers(say("a"))) == ["1"] and len(server.requests) == 2
    assert (tmp_path / "answers.jsonl").stat().st_size < 2000


# Good answers in bodies that other clients fail on, and the prompt and answer tokens to count. Without a count, these
# are at most 34 and 1024.
ODD_BODIES = {
    "null": (completion("fine", completion_tokens=None), (100, 1024)),
    "no usage": (completion("fine", usage=None), (34, 1024)),
    "usage of zero": (completion("fine", 0, 0), (34, 1024)),
    "infinite": (completion("fine", float("inf")), (34, 10)),
    "negative": (completion("fine", -(10**9), -1), (34, 1024)),
    "text": (completion("fine", "100", "many"), (100, 1024)),
    "total": (completion("fine", usage={"prompt_tokens": 9, "completion_tokens": 10, "total_tokens": 59}), (9, 50)),
    "parts": (completion([{"type": "thinking", "thinking": []}, {"type": "text", "text": "fine"}]), (100, 10)),
    "texts": (completion(["fi", "ne"]), (100, 10)),
    "no model": (completion("fine", model=None), (100, 10)),
    "no error": (completion("fine", error=None), (100, 10)),
    "other finish": (completion("fine", finish_reason="end_turn"), (100, 10)),
    "thoughts": (completion("<think>\nis it?</think>\nfine"), (100, 10)),
}  # fmt: skip


@pytest.mark.parametrize("form", ODD_BODIES)
def test_good_answer_in_an_odd_body_is_used_and_no_bill_is_lowered(form, tmp_path):
    body, tokens = ODD_BODIES[form]
    with chat_server(lambda request, number: Reply(body=body)) as server:
        client = client_of(server, tmp_path)
        assert client.complete(say("a")) == "fine"
    assert (client.budget.spent.prompt_tokens, client.budget.spent.completion_tokens) == tokens


def test_text_longer_than_the_limit_counts_by_its_length_if_the_server_does_not_count():
    assert read_completion(completion("a" * 4000, usage=None), "writer", (34, 100))["completion_tokens"] == 1000


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>8 7?</think>\n9 6", "9 6"),
        ("8 7?</think>9 6", "9 6"),
        ("<thinking>a</thinking><Reasoning>b</Reasoning> c ", "c"),
        ("[THINK]a[/THINK]b", "b"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "b"),
        ("<think>I wonder", ""),
        ("a <think> b", "a <think> b"),
    ],
)
def test_reasoning_is_no_part_of_an_answer(text, answer):
    assert without_thoughts(text) == answer


WRONG_BODIES = {
    "deep": ("[" * 100_000, "not a chat completion .*nested too deeply"),
    "null": ("null", "not a chat completion"),
    "binary": ("\0" * 100, "not a chat completion"),
    "page": ("<html>" + "a" * 100_000, "not a chat completion"),
    "no choices": (completion("", choices=[]), "not a chat completion"),
}


@pytest.mark.parametrize("kind", WRONG_BODIES)
def test_response_that_is_no_completion_is_a_short_failure_and_counts_in_full(tmp_path, kind):
    body, error = WRONG_BODIES[kind]
    with chat_server(lambda request, number: Reply(body=body)) as server:
        client = client_of(server, tmp_path, retries=0)
        with pytest.raises(ChatFailure, match=error) as raised:
            client.complete(say("a"))
    assert len(str(raised.value)) < 600 and not isinstance(raised.value, UnusableAnswer)
    [line] = client.journal.all()
    assert "answer" not in line and (line["prompt_tokens"], line["completion_tokens"]) == (34, 1024)
    assert (tmp_path / "answers.jsonl").stat().st_size < 2000
