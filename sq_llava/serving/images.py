"""The images of a request: from data: URLs and, if allowed, from public http(s) servers.

A client must not reach a file on this machine, or a server that only this machine can reach. Other URLs are refused.
Pillow opens only the four image formats of the web, none of which starts a program. For a remote image, each host
(also after a redirect) is resolved once. All its addresses must be public, and the connection goes to one of them.
"""

import asyncio
import base64
import binascii
import ipaddress
import re
import socket
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.resolver import ThreadedResolver
from PIL import Image, UnidentifiedImageError
from yarl import URL

from image_processing_sq_llava import open_header, open_stream
from sq_llava.data.images import open_sent_image


FORMATS = ("GIF", "JPEG", "PNG", "WEBP")
DATA_URL = re.compile(r"data:image/[a-zA-Z0-9.+-]+;base64,", re.ASCII)
MAX_REDIRECTS = 3
DOWNLOAD_SECONDS = 10.0

# The routed part of IPv6. Loopback, link-local, private and multicast addresses are outside of it, and so are IPv4
# addresses written as IPv6 (::ffff:127.0.0.1, 64:ff9b::7f00:1). Inside are two tunnels that end at an IPv4 address.
ROUTED_IPV6 = ipaddress.IPv6Network("2000::/3")
TUNNELS = (ipaddress.IPv6Network("2001::/32"), ipaddress.IPv6Network("2002::/16"))


def decode_data_url(url: str) -> bytes:
    """
    The bytes of a data: URL.

    Raises:
        ValueError: if it is not of the form `data:image/...;base64,...`.
    """
    match = DATA_URL.match(url)
    if match is None:
        raise ValueError("is not of the form data:image/png;base64,...")
    try:
        # Many encoders break the lines.
        return base64.b64decode(re.sub(r"[\r\n\t ]+", "", url[match.end() :]), validate=True)
    except binascii.Error as error:
        raise ValueError(f"is not valid base64 ({error})") from error


def num_pixels(data: bytes) -> int:
    """
    Number of pixels of an image. Only the header is read.

    Raises:
        ValueError: if the bytes are not an image in one of the four formats, or were made to take very long.
    """
    try:
        with open_stream(data) as stream, open_header(stream, FORMATS) as image:
            return image.width * image.height
    except UnidentifiedImageError as error:
        raise ValueError(f"is not an image in one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # for broken files, Pillow's parsers raise errors of any kind
        raise ValueError(f"is a broken image ({error})") from error


def decode_image(data: bytes) -> Image.Image:
    """
    The decoded image, scaled down by [`open_sent_image`] if it is large.

    Raises:
        ValueError: if the bytes cannot be read as an image.
    """
    try:
        return open_sent_image(data, FORMATS)
    except ValueError as error:
        raise ValueError(f"is a broken image ({error.__cause__ or error})") from error


def is_public(address: str) -> bool:
    """`True` if an IP address belongs to the public internet."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:
        return ip in ROUTED_IPV6 and ip.is_global and not any(ip in tunnel for tunnel in TUNNELS)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class PublicResolver(AbstractResolver):
    """Resolves names to public addresses only. The connection uses this result, so a later change has no effect."""

    def __init__(self):
        self.resolver = ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list:
        found = await self.resolver.resolve(host, port, family)
        for entry in found:
            if not is_public(entry["host"]):
                raise ValueError(f"is at {host}, which is not a host on the public internet")
        return found

    async def close(self) -> None:
        await self.resolver.close()


async def fetch(url: str, max_bytes: int) -> bytes:
    """
    Downloads an image from a public server.

    Args:
        max_bytes (`int`): Maximum size of the file.

    Raises:
        ValueError: if the address is not public, or the download fails, is too large or too slow.
    """
    connector = aiohttp.TCPConnector(resolver=PublicResolver(), family=socket.AF_UNSPEC)
    headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "sq-llava"}
    session = aiohttp.ClientSession(
        connector=connector, headers=headers, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
    )
    try:
        async with asyncio.timeout(DOWNLOAD_SECONDS), session:
            for _ in range(MAX_REDIRECTS + 1):
                async with session.get(_checked(url), allow_redirects=False) as response:
                    if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                        url = urljoin(url, response.headers["Location"])
                    elif response.status == 200:
                        return await _read(response, max_bytes)
                    else:
                        raise ValueError(f"could not be downloaded: the server answered {response.status}")
            raise ValueError(f"could not be downloaded: it was redirected more than {MAX_REDIRECTS} times")
    except TimeoutError as error:
        raise ValueError(f"could not be downloaded within {DOWNLOAD_SECONDS:g} seconds") from error
    except (aiohttp.ClientError, OSError) as error:
        # The text of the error could reveal details of this machine's network.
        raise ValueError("could not be downloaded") from error


class TooLarge(ValueError):
    """A remote image has more bytes than allowed."""


def _checked(url: str) -> URL:
    parsed = URL(url)
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError("does not lead to an http or https server")
    if parsed.user is not None or parsed.password is not None:
        raise ValueError("contains a user name or a password")
    # The resolver checks the addresses of a name. A literal address does not go through it, so it is checked here. The
    # operating system also accepts incomplete addresses of digits and dots (2130706433, 127.1): they are refused.
    host = parsed.raw_host
    is_address = ":" in host or host.replace(".", "").isdigit()
    try:
        is_allowed = not is_address or is_public(host)
    except ValueError:
        is_allowed = False
    if not is_allowed:
        raise ValueError(f"is at {host}, which is not a host on the public internet")
    return parsed


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_chunked(65536):
        data += chunk
        if len(data) > max_bytes:
            raise TooLarge(f"has more than {max_bytes:,} bytes")
    return bytes(data)
