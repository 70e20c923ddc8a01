"""Who asks, and under which name: what of a request's headers is believed, and which names lead here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.datastructures import Headers
from starlette.types import Scope

from training.errors import InputError

Address = IPv4Address | IPv6Address
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([0-9a-z](?:[0-9a-z._-]{0,251}[0-9a-z])?)\.?)(?::\d{1,5})?", re.I)
_SPEAK_FOR_OTHERS = re.compile(rb"(x-)?forwarded(-.*)?|x-real-ip|x-original-.*|x-gradio-server")


@dataclass(frozen=True)
class Hosts:
    """Names under which the server may be asked, and proxies whose word on a request counts.

    Attributes:
        names: Beside ``localhost``, for this machine, and the address that the request came to.
        proxies: Addresses or networks.
    """

    names: frozenset[str] = frozenset()
    proxies: Sequence[IPv4Network | IPv6Network] = field(default=())

    @classmethod
    def parse(cls, names: Sequence[str], proxies: Sequence[str]) -> Hosts:
        """From what a user wrote.

        Raises:
            InputError: If one is no name, or no address.
        """
        for name in names:
            if host_name(name) != name.lower():
                raise InputError(f"serve: {name!r} is no host name; write it as browsers show it, without a port")
        try:
            return cls(frozenset(name.lower() for name in names), tuple(ip_network(proxy) for proxy in proxies))
        except ValueError as error:
            raise InputError(f"serve: {error}; give the address of the proxy, such as 127.0.0.1") from error

    def behind_proxy(self, scope: Scope) -> Scope:
        """A request as its client made it.

        A trusted proxy's ``X-Forwarded-For``, ``-Host`` and ``-Proto`` take the place of the connection's own. Headers
        that speak for others are left out then, and altogether where anybody else sent them.
        """
        headers = Headers(scope=scope)
        kept = [(name, value) for name, value in scope["headers"] if not _SPEAK_FOR_OTHERS.fullmatch(name.lower())]
        direct = {**scope, "headers": kept}
        if not self.trusts(address(scope)):
            return direct
        # Each proxy adds what it saw at the end, after whatever a client made up.
        hops = [parse_address(hop) for hop in _listed(headers, "x-forwarded-for")]
        client = next((hop for hop in reversed(hops) if not self.trusts(hop)), None)
        if client is not None:
            direct["client"] = (str(client), 0)
        if host := _listed(headers, "x-forwarded-host"):
            named = [(name, value) for name, value in kept if name.lower() != b"host"]
            direct["headers"] = [*named, (b"host", host[-1].encode("latin-1"))]
        if (scheme := _listed(headers, "x-forwarded-proto")) and scheme[-1] in ("http", "https"):
            direct["scheme"] = scheme[-1]
        return direct

    def knows(self, scope: Scope) -> bool:
        """Whether a request asks for this server under a name of its own.

        A stranger's page can point a name of its own at this machine, and would then read what this server answers.
        It cannot do so with an address.
        """
        name = host_name(*Headers(scope=scope).getlist("host"))
        if name is None:
            return False
        here = str((scope.get("server") or ("", 0))[0])
        if name in self.names or name == here:
            return True
        asked, client = parse_address(name), address(scope)
        local = client is None or client.is_loopback  # without an address: from this process, or by a Unix socket
        if asked is None:
            return name == "localhost" and local
        return asked == parse_address(here) or (asked.is_loopback and local)

    def trusts(self, proxy: Address | None) -> bool:
        """Whether an address is a proxy's whose word counts."""
        return proxy is not None and any(proxy in network for network in self.proxies)


def host_name(*hosts: str) -> str | None:
    """The name or address in a ``Host`` header, in lower case without its port; None unless there is exactly one."""
    found = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    return (found[1] or found[2]).lower() if found else None


def address(scope: Scope) -> Address | None:
    """From where a connection comes."""
    return parse_address((scope.get("client") or ("", 0))[0])


def parse_address(text: str) -> Address | None:
    """An address; an IPv4 one that is written as IPv6 counts as IPv4. None for anything else."""
    try:
        found = ip_address(text.strip().strip("[]").partition("%")[0])
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    found = parse_address(host)
    return host == "localhost" or (found is not None and found.is_loopback)


def is_foreign(headers: Headers) -> bool:
    """Whether a browser sends this for a page of another site, with the user's password perhaps."""
    origin = headers.get("origin")
    if origin is None:
        return False
    scheme, _, host = origin.partition("://")
    return not scheme or not host or host.lower() != (headers.get("host") or "").lower()


def _listed(headers: Headers, name: str) -> list[str]:
    return [part.strip() for part in ",".join(headers.getlist(name)).split(",") if part.strip()]
