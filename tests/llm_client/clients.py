"""Clients of the server in `tests/chat_server.py`, and what they ask it."""

import json
from pathlib import Path

from sq_llava.llm_client.asking import ask_all
from sq_llava.llm_client.client import ChatClient
from sq_llava.llm_client.settings import ChatSettings
from tests.chat_server import Reply


def client_of(server, folder: Path, server_matters: bool = False, **overrides) -> ChatClient:
    values = {"model": "writer", "base_url": server.url, "retries": 2, "timeout": 5.0, **overrides}
    return ChatClient(ChatSettings(**values), folder / "answers.jsonl", server_matters)


def reader_of(folder: Path, **settings) -> ChatClient:
    """A client that only reads the journal in `folder`."""
    return ChatClient(ChatSettings("writer", **settings), folder / "answers.jsonl", reads_only=True)


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def ask(client: ChatClient, *texts: str):
    return ask_all(client, {text: text for text in texts}, lambda text: client.complete(say(text)), "asks")


def echo(request: dict, number: int) -> str:
    return f"heard {request['messages'][-1]['content']}"


def refusal(status: int, message: str = "no") -> Reply:
    return Reply(status=status, body=json.dumps({"error": {"message": message}}))
