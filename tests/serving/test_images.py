"""Remote images: which are downloaded, and which are refused."""

import asyncio
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fastapi.testclient import TestClient

from sq_llava.serving import images
from sq_llava.serving.app import create_app
from sq_llava.serving.chat import Limits
from sq_llava.serving.images import fetch, is_public
from tests import tiny
from tests.serving.test_chat import data_url, user


PUBLIC = "127.0.0.2"  # counts as a public address in these tests; 127.0.0.1 does not


@contextmanager
def image_server(address: str = PUBLIC):
    """Yields the port of a server, and the list of paths that were requested."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            kind, _, target = self.path[1:].partition("/")
            if kind == "redirect":
                self.send_response(302)
                self.send_header("Location", target)
                self.end_headers()
                return
            self.send_response(404 if kind == "missing" else 200)
            self.end_headers()
            if kind == "slow":
                stop.wait(20)
            self.wfile.write(b"x" * (5000 if kind == "large" else 50))

        def log_message(self, *args):
            pass

    stop = threading.Event()
    server = ThreadingHTTPServer((address, 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.server_port, asked
    finally:
        stop.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def resolver(monkeypatch) -> dict[str, list[str]]:
    """Names with their addresses, which replace the machine's own resolver. PUBLIC counts as a public address."""
    names = {}
    original = socket.getaddrinfo

    def resolve(host, port, *args, **kwargs):
        if host not in names:
            return original(host, port, *args, **kwargs)
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in names[host]]
        return [
            (family, socket.SOCK_STREAM, 6, "", (address, port, 0, 0)[: 4 if ":" in address else 2])
            for family, address in zip(families, names[host])
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(images, "is_public", lambda address: address == PUBLIC or is_public(address))
    return names


def get(url: str, max_bytes: int = 1000) -> bytes:
    return asyncio.run(fetch(url, max_bytes))


NOT_PUBLIC = """
    0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 127.9.9.9 169.254.169.254 172.16.0.1 192.0.2.1 192.168.1.1 198.18.0.1
    224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 :: ::1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::127.0.0.1 64:ff9b::7f00:1
    64:ff9b:1::1 fc00::1 fd12::1 fe80::1 fe80::1%eth0 fec0::1 ff02::1 2001::1 2001:db8::1 2002:7f00:1::1
"""
PUBLIC_ADDRESSES = "8.8.8.8 93.184.216.34 2606:4700::1111 2a00:1450:4001::200e"
THIS_MACHINE = """
    127.0.0.1 127.1 2130706433 0x7f000001 0x7f.1 0177.0.0.1 017700000001 localhost localhost. [::1]
    [::ffff:127.0.0.1] [::ffff:7f00:1] [64:ff9b::7f00:1] 0 0.0.0.0 １２７.0.0.1 127。0。0。1 ①②⑦.⓪.⓪.①
"""
REDIRECTS = [
    "http://127.0.0.1:{port}/x",
    "http://2130706433:{port}/x",
    "http://inner.test:{port}/x",
    "//localhost:{port}/x",
    "gopher://127.0.0.1/x",
    "file:///etc/passwd",
]


@pytest.mark.parametrize("address", [*NOT_PUBLIC.split(), *PUBLIC_ADDRESSES.split()])
def test_public_addresses_are_recognised(address):
    assert is_public(address) is (address in PUBLIC_ADDRESSES.split())


@pytest.mark.parametrize("host", THIS_MACHINE.split())
def test_no_spelling_of_this_machine_is_reached(host):
    with (
        image_server("127.0.0.1") as (port, asked),
        pytest.raises(ValueError, match=r"not a host on the public|downloaded"),
    ):
        get(f"http://{host}:{port}/image")
    assert asked == []


def test_image_on_a_public_host_is_downloaded(resolver):
    resolver["photos.test"] = [PUBLIC]
    with image_server() as (port, asked):
        assert get(f"http://photos.test:{port}/image") == b"x" * 50
        assert get(f"http://photos.test:{port}/redirect//image") == b"x" * 50
    assert asked == ["/image", "/redirect//image", "/image"]


@pytest.mark.parametrize("addresses", [["127.0.0.1"], [PUBLIC, "127.0.0.1"], ["::1"], ["10.0.0.1"], ["fe80::1"]])
def test_name_with_a_private_address_is_refused(resolver, addresses):
    resolver["trap.test"] = addresses
    with image_server() as (port, asked), pytest.raises(ValueError, match="not a host on the public internet"):
        get(f"http://trap.test:{port}/image")
    assert asked == []


def test_name_is_resolved_once_and_the_connection_uses_that_address(resolver, monkeypatch):
    resolver["rebind.test"] = [PUBLIC]
    counted = socket.getaddrinfo
    times = []

    def resolve(host, *args, **kwargs):
        found = counted(host, *args, **kwargs)
        if host == "rebind.test":
            times.append(host)
            resolver["rebind.test"] = ["127.0.0.1"]
        return found

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with image_server("127.0.0.1") as (_, private), image_server() as (port, asked):
        get(f"http://rebind.test:{port}/image")
    assert (times, asked, private) == (["rebind.test"], ["/image"], [])


@pytest.mark.parametrize("target", REDIRECTS)
def test_redirect_to_this_machine_is_not_followed(resolver, target):
    resolver.update({"photos.test": [PUBLIC], "inner.test": ["127.0.0.1"]})
    with (
        image_server("127.0.0.1") as (inner, private),
        image_server() as (port, asked),
        pytest.raises(ValueError, match=r"not a host on the public internet|not lead to an http"),
    ):
        get(f"http://photos.test:{port}/redirect/{target.format(port=inner)}")
    assert len(asked) == 1 and private == []


def test_large_slow_missing_and_looping_images_are_refused(resolver, monkeypatch):
    resolver["photos.test"] = [PUBLIC]
    monkeypatch.setattr(images, "DOWNLOAD_SECONDS", 0.3)
    with image_server() as (port, _):
        for path, problem in (
            ("large", "more than 1,000 bytes"),
            ("slow", "within 0.3 seconds"),
            ("missing", "the server answered 404"),
            ("redirect//redirect//redirect//redirect//image", "redirected more than 3 times"),
        ):
            with pytest.raises(ValueError, match=problem):
                get(f"http://photos.test:{port}/{path}")
    with pytest.raises(ValueError, match=r"could not be downloaded$"):
        get(f"http://photos.test:{port}/closed")
    with pytest.raises(ValueError, match="a user name or a password"):
        get(f"http://me:secret@photos.test:{port}/image")


def test_remote_image_gets_the_same_answer_as_in_a_data_url(assistant, monkeypatch):
    image, fetched = tiny.picture(), []

    async def fetch_one(url, max_bytes):
        fetched.append(url)
        return images.decode_data_url(data_url(image))

    monkeypatch.setattr("sq_llava.serving.chat.fetch", fetch_one)
    with TestClient(create_app(assistant, "tiny", Limits(allow_remote_images=True), 2)) as http:
        texts = []
        for url in ("https://photos.test/a.png", data_url(image)):
            body = {"model": "tiny", "messages": [user(None, url)], "temperature": 0, "max_tokens": 6}
            texts.append(http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"])
    assert texts[0] == texts[1] and fetched == ["https://photos.test/a.png"]


def test_remote_images_of_a_request_share_the_limit_on_its_size(assistant, monkeypatch):
    data, limits = images.decode_data_url(data_url(tiny.picture())), []

    async def fetch_one(url, max_bytes):
        limits.append(max_bytes)
        if url.endswith("large.png"):
            raise images.TooLarge(f"has more than {max_bytes:,} bytes")
        return data

    def ask(http, *names):
        message = user(None, *(f"https://photos.test/{name}.png" for name in names))
        return http.post("/v1/chat/completions", json={"model": "tiny", "messages": [message], "max_tokens": 1})

    monkeypatch.setattr("sq_llava.serving.chat.fetch", fetch_one)
    with TestClient(create_app(assistant, "tiny", Limits(100_000, allow_remote_images=True), 1)) as http:
        ask(http, "a", "b")
        refused = ask(http, "a", "large")
    assert limits == [100_000, 100_000 - len(data)] * 2
    assert refused.status_code == 413 and "at most 100,000 bytes together" in refused.json()["error"]["message"]


def test_large_image_in_a_request_does_not_keep_the_other_requests_waiting(assistant, monkeypatch):
    threads = []

    def decode(url):
        threads.append(threading.current_thread().name)
        return images.decode_data_url(url)

    monkeypatch.setattr("sq_llava.serving.chat.decode_data_url", decode)
    with TestClient(create_app(assistant, "tiny", Limits(), 1)) as http:
        body = {"model": "tiny", "messages": [user(None, tiny.picture())], "max_tokens": 1}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert [name.rpartition("_")[0] for name in threads] == ["preparing"]
