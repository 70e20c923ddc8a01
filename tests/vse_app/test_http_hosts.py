from __future__ import annotations

from typing import Any

import pytest
from starlette.types import Scope

from training.errors import InputError
from vse_app.http_hosts import Hosts, is_loopback

HERE, OTHER = "192.168.1.5", "192.168.1.9"


def asked(host: str | None, client: str = OTHER, server: str = HERE, **headers: str) -> Scope:
    named = [] if host is None else [(b"host", host.encode("latin-1"))]
    sent = [*named, *((name.strip("_").replace("_", "-").encode(), value.encode()) for name, value in headers.items())]
    return {"type": "http", "scheme": "http", "client": (client, 9), "server": (server, 7860), "headers": sent}


@pytest.mark.parametrize(
    ("scope", "known"),
    [
        (asked("127.0.0.1:7860", "127.0.0.1", "127.0.0.1"), True),
        (asked("localhost:7860", "127.0.0.1", "127.0.0.1"), True),
        (asked("LocalHost", "127.0.0.1", "127.0.0.1"), True),
        (asked("[::1]:7860", "::1", "::1"), True),
        (asked("localhost:7860", "::1", "::1"), True),
        (asked("127.0.0.1", "::1", "::1"), True),
        (asked(f"{HERE}:7860"), True),
        (asked(HERE), True),
        (asked("[fe80::5]:7860", "fe80::9", "fe80::5%eth0"), True),
        (asked(f"{HERE}:7860", f"::ffff:{OTHER}", f"::ffff:{HERE}"), True),
        (asked("photos.home:7860"), True),
        (asked("PHOTOS.home."), True),
        (asked("10.0.0.7"), True),
        (asked("evil.com", "127.0.0.1", "127.0.0.1"), False),
        (asked("evil.com:7860", "::1", "::1"), False),
        (asked("evil.com:7860"), False),
        (asked("localhost:7860"), False),  # whoever says so comes from elsewhere
        (asked("127.0.0.1:7860"), False),
        (asked("[::1]:7860"), False),
        (asked("0.0.0.0:7860", "127.0.0.1", "127.0.0.1"), False),
        (asked("[::]:7860", "::1", "::1"), False),
        (asked("6.6.6.6"), False),
        (asked("127.0.0.1.evil.com", "127.0.0.1", "127.0.0.1"), False),
        (asked("localhost.evil.com", "127.0.0.1", "127.0.0.1"), False),
        (asked("evil.com@127.0.0.1", "127.0.0.1", "127.0.0.1"), False),
        (asked("127.0.0.1@evil.com", "127.0.0.1", "127.0.0.1"), False),
        (asked("127.0.0.1:7860, evil.com", "127.0.0.1", "127.0.0.1"), False),
        (asked("127.0.0.1:x", "127.0.0.1", "127.0.0.1"), False),
        (asked("127.0.0.1/evil.com", "127.0.0.1", "127.0.0.1"), False),
        (asked("2130706433", "127.0.0.1", "127.0.0.1"), False),
        (asked("[::1", "::1", "::1"), False),
        (asked("", "127.0.0.1", "127.0.0.1"), False),
        (asked(None, "127.0.0.1", "127.0.0.1"), False),
        (asked("photos.home", host_="evil.com"), False),  # two of them
        (asked("evil.com", x_forwarded_host="photos.home"), False),
        (asked("\xff\x1b", "127.0.0.1", "127.0.0.1"), False),
    ],
)
def test_names_that_lead_here(scope: Scope, known: bool) -> None:
    assert Hosts.parse(["Photos.home", "10.0.0.7"], []).knows(scope) is known


FORWARDED = {
    "x_forwarded_for": "6.6.6.6, 8.8.8.8",
    "x_forwarded_host": "evil.com, photos.home",
    "x_forwarded_proto": "https",
}


@pytest.mark.parametrize("client", [OTHER, "127.0.0.1", "testclient", "10.9.0.1"])
def test_nobody_speaks_for_others(client: str) -> None:
    more = {
        "forwarded": "for=6.6.6.6",
        "x_real_ip": "6.6.6.6",
        "x_gradio_server": "http://evil.com",
        "x_forwarded_prefix": "/a",
    }
    scope = Hosts.parse([], ["10.8.0.0/16", "fd00::/8"]).behind_proxy(asked("a.test", client, **FORWARDED, **more))
    assert scope["client"][0] == client
    assert scope["scheme"] == "http"
    assert scope["headers"] == [(b"host", b"a.test")]


@pytest.mark.parametrize(
    ("sent", "client"),
    [
        ({}, "10.8.0.1"),
        ({"x_forwarded_for": "6.6.6.6"}, "6.6.6.6"),
        ({"x_forwarded_for": "1.1.1.1, 6.6.6.6"}, "6.6.6.6"),  # the first is what the client made up
        ({"x_forwarded_for": "1.1.1.1, 6.6.6.6, 10.8.0.2"}, "6.6.6.6"),
        ({"x_forwarded_for": "2001:db8::1"}, "2001:db8::1"),
        ({"x_forwarded_for": "nonsense"}, "10.8.0.1"),
        ({"x_forwarded_for": "10.8.0.3"}, "10.8.0.1"),
        ({"forwarded": "for=6.6.6.6"}, "10.8.0.1"),
    ],
)
def test_a_trusted_proxy_says_who_asks(sent: dict[str, Any], client: str) -> None:
    hosts = Hosts.parse(["photos.home"], ["10.8.0.0/16"])
    scope = hosts.behind_proxy(asked("127.0.0.1:7860", "10.8.0.1", **sent))
    assert scope["client"][0] == client


def test_a_trusted_proxy_says_under_which_name() -> None:
    hosts = Hosts.parse(["photos.home"], ["10.8.0.1"])
    scope = hosts.behind_proxy(asked("127.0.0.1:7860", "10.8.0.1", **FORWARDED))
    assert (scope["client"][0], scope["scheme"], scope["headers"]) == ("8.8.8.8", "https", [(b"host", b"photos.home")])
    assert hosts.knows(scope)
    assert not Hosts.parse([], ["10.8.0.1"]).knows(scope)


@pytest.mark.parametrize("name", ["", "http://a.test", "a.test:80", "a/b", "a b", "-a", "a,b", "*"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(InputError, match="host name"):
        Hosts.parse([name], [])


@pytest.mark.parametrize("proxy", ["", "nginx", "*", "10.8.0.1:80", "10.8.0.1/99", "10.8.0.1/8"])
def test_what_is_no_proxy(proxy: str) -> None:
    with pytest.raises(InputError, match="address of the proxy"):
        Hosts.parse([], [proxy])


def test_what_only_this_machine_reaches() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.0.0.2", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", HERE, "photos.home", "")))
