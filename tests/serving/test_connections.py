"""Connections that wait: half a header, nothing at all, a body that trickles. Each uses a real socket."""

import asyncio
import time
from contextlib import suppress
from functools import partial

import pytest
import uvicorn
from uvicorn.server import ServerState

from sq_llava.serving.connections import TimedConnection, hosts_to_accept, is_loopback


SECONDS = 0.1
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HALF = REQUEST[:-2]


async def app(scope, receive, send):
    """Answers at once. For POST, first reads the body."""
    more = scope["method"] == "POST"
    while more:
        more = (await receive()).get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def talk(client, **settings):
    """Runs `client(connect)`, which gets a function that opens a connection to a server with this time limit."""

    async def run():
        config = uvicorn.Config(app, http=partial(TimedConnection, header_seconds=SECONDS), ws="none", log_config=None)
        config.load()
        make = partial(config.http_protocol_class, config=config, server_state=ServerState(), app_state={})
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        async with server, asyncio.timeout(10):
            return await client(partial(asyncio.open_connection, *server.sockets[0].getsockname()))

    return asyncio.run(run())


async def seconds_until_closed(reader: asyncio.StreamReader) -> float:
    began = time.monotonic()
    with suppress(ConnectionResetError):  # the client still had bytes on their way
        await reader.read()
    return time.monotonic() - began


def test_half_sent_headers_are_closed_in_time_however_many_they_are():
    async def client(connect):
        connections = [await connect() for _ in range(100)]
        for _, writer in connections:
            writer.write(HALF)
        waits = await asyncio.gather(*(seconds_until_closed(reader) for reader, _ in connections))
        assert max(waits) < 50 * SECONDS  # a busy machine may take longer

    talk(client)


@pytest.mark.parametrize(
    ("begin", "rest"),
    [
        (b"", HALF * 2),
        (REQUEST, HALF * 2),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nab", HALF * 2),
        (b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", b"x" * 30),
    ],
    ids=["new connection", "after a reply", "after a body", "rest of a body"],
)
def test_bytes_that_trickle_do_not_keep_a_connection_open(begin, rest):
    async def client(connect):
        reader, writer = await connect()
        if begin:
            writer.write(begin)
            await reader.readuntil(b"ok")
        closing = asyncio.ensure_future(seconds_until_closed(reader))
        for byte in rest:
            if closing.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(SECONDS / 10)
        assert closing.done()

    talk(client)


def test_connection_that_says_nothing_is_closed():
    async def client(connect):
        reader, _ = await connect()
        assert await seconds_until_closed(reader) < 50 * SECONDS

    talk(client)


def test_slow_body_and_later_requests_are_answered():
    async def client(connect):
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\na")
        await asyncio.sleep(2 * SECONDS)  # the limit is for headers
        writer.write(b"b")
        await reader.readuntil(b"ok")
        for _ in range(3):
            await asyncio.sleep(SECONDS / 2)
            writer.write(REQUEST)
            await reader.readuntil(b"ok")

    talk(client)


def test_huge_header_is_refused():
    async def client(connect):
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 1_000_000)
        assert (await reader.read(100)).startswith(b"HTTP/1.1 4")

    talk(client)


@pytest.mark.parametrize(
    ("host", "allowed_hosts", "expected"),
    [
        ("127.0.0.1", None, {"localhost", "127.0.0.1", "[::1]"}),
        ("::1", ["example.org"], {"localhost", "127.0.0.1", "[::1]", "example.org"}),
        ("127.0.0.2", None, {"localhost", "127.0.0.1", "[::1]", "127.0.0.2"}),
        ("0.0.0.0", None, {"*"}),
        ("0.0.0.0", ["*.example.org"], {"localhost", "127.0.0.1", "[::1]", "0.0.0.0", "*.example.org"}),
    ],
)
def test_names_of_the_server(host, allowed_hosts, expected):
    assert set(hosts_to_accept(host, allowed_hosts)) == expected
    assert is_loopback(host) == (host != "0.0.0.0")


@pytest.mark.parametrize("name", ["a*.example.org", "example.org:8000", "http://example.org", ""])
def test_wrong_name_of_the_server_is_refused(name):
    with pytest.raises(ValueError, match=r"--allowed-hosts is .*: give a name without port"):
        hosts_to_accept("127.0.0.1", [name])
