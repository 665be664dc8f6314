"""Requests to addresses that clients name: nothing private is reached through them.

A name is looked up once, every address it has must be public, and the connection goes to the address that was checked.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx2

from llmprune_service.settings import Settings

MAX_URL = 2048
_PORTS = (None, 443, 8443)
_VISIBLE = re.compile(r"[!-~]+")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_IPV6_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Not listed as private everywhere, yet the inside of clouds: agents of Azure and Oracle answer here.
_INTERNAL = (ipaddress.ip_network("168.63.129.16"), ipaddress.ip_network("192.0.0.0/24"))
# Not the event loop's own threads: it would wait for a lookup that hangs beyond the deadline.
_RESOLVERS = ThreadPoolExecutor(8, thread_name_prefix="resolve")


class Refused(Exception):
    """A URL, or an address behind it, that requests may not go to."""


class Unreachable(Exception):
    """No answer: no such name, no connection, no valid certificate, or too slow."""


def check_url(url: str, settings: Settings) -> httpx2.URL:
    """The parsed URL; raises Refused where its form says that it must not be asked. Nothing is looked up."""
    if len(url) > MAX_URL or not _VISIBLE.fullmatch(url) or "\\" in url:
        raise Refused(f"A URL has at most {MAX_URL} characters, all of them printable ASCII other than spaces and backslashes.")
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        raise Refused("This is not a URL; give one such as https://example.com/hook.") from None
    host = _host(parsed)
    listed = _is_listed(host, settings)
    if parsed.scheme != "https" and not (parsed.scheme == "http" and listed):
        raise Refused("The URL must begin with https://; http is for hosts of LLMPRUNE_WEBHOOK_HOSTS alone.")
    if parsed.userinfo or "#" in url:
        raise Refused("The URL must hold neither user name, password nor fragment; deliveries are signed instead.")
    if not _HOST.fullmatch(host) or (parsed.port is not None and not 0 < parsed.port < 2**16):
        raise Refused("The URL names no host, or no port there is; give one such as https://example.com/hook.")
    if listed:
        return parsed
    if parsed.port not in _PORTS:
        raise Refused("The port must be 443 or 8443; others are for hosts of LLMPRUNE_WEBHOOK_HOSTS alone.")
    if (_is_address(host) and not _is_public(host)) or not set(host) & {".", ":"}:
        raise Refused("The host must be public; private ones have to be listed in LLMPRUNE_WEBHOOK_HOSTS.")
    return parsed


def post(url: str, *, body: bytes, headers: Mapping[str, str], settings: Settings, timeout: float = 10.0) -> int:
    """POST ``body`` and return the status of the answer, whose body is not read; redirects are not followed.

    ``timeout`` seconds are all there is, lookup included. Not to be called from a running event loop.

    Raises:
        Refused: by :func:`check_url`, or an address of the host is not public.
        Unreachable: no answer in time.
    """
    parsed = check_url(url, settings)
    try:
        return asyncio.run(asyncio.wait_for(_post(parsed, body, headers, settings, timeout), timeout))
    except (TimeoutError, httpx2.TimeoutException):
        raise Unreachable(f"No answer within {timeout:g} seconds.") from None
    except (httpx2.HTTPError, OSError, UnicodeError) as error:
        raise Unreachable((" ".join(str(error).split()) or type(error).__name__)[:200]) from None


async def _post(url: httpx2.URL, body: bytes, headers: Mapping[str, str], settings: Settings, timeout: float) -> int:
    *others, last = await _addresses(url, settings)
    limits = httpx2.Timeout(timeout, connect=timeout / 2)
    # No proxy of the environment: it would look the name up again.
    async with httpx2.AsyncClient(trust_env=False, timeout=limits, verify=httpx2.create_ssl_context()) as client:

        async def ask(address: str) -> int:
            request = client.build_request(
                "POST", url.copy_with(host=address), content=body, headers={**headers, "Host": url.netloc.decode("ascii")},
                extensions={"sni_hostname": _host(url)},
            )  # fmt: skip
            response = await client.send(request, stream=True, follow_redirects=False)
            await response.aclose()
            return response.status_code

        for address in others:
            with suppress(httpx2.ConnectError, httpx2.ConnectTimeout):
                return await ask(address)
        return await ask(last)


async def _addresses(url: httpx2.URL, settings: Settings) -> list[str]:
    """Every address of the host, in the resolver's order."""
    host = _host(url)
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    found = await asyncio.get_running_loop().run_in_executor(_RESOLVERS, _look_up, host, port)
    if not _is_listed(host, settings) and not all(map(_is_public, found)):
        raise Refused("The host has an address that is not public.")
    return found


def _look_up(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _host(url: httpx2.URL) -> str:
    return url.raw_host.decode("ascii").lower()


def _is_listed(host: str, settings: Settings) -> bool:
    return host in {name.lower() for name in settings.webhook_hosts}


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_public(text: str) -> bool:
    """Whether an address is one of the public internet; IPv4 addresses inside IPv6 ones count as themselves."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None or address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        elif address not in _IPV6_UNICAST or address.sixtofour is not None or address.teredo is not None:
            return False  # tunnels lead anywhere, and nobody receives behind one
    return address.is_global and not address.is_multicast and not any(address in network for network in _INTERNAL)
