"""Who may change something: decided once, at the start, until there are keys."""

from __future__ import annotations

import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from deployments.errors import Forbidden, Unauthorized

_SET = "set ONEBASE_ADMIN_TOKEN where the server starts, and send it as Authorization: Bearer …"


class Access:
    """The rule for requests that change something.

    With a token, all of them need it. Without one, a server that listens on loopback alone takes
    them from anybody on its machine, and any other takes none. Neither the peer's address nor what
    a header says of it opens anything: behind a proxy every peer is 127.0.0.1.
    """

    def __init__(self, host: str, token: str | None) -> None:
        """Take the host that the server was configured to listen on, and the token if there is."""
        self._token = None if token is None else token.encode()
        self._open = token is None and is_loopback(host)

    def check(self, authorization: str | None, origin: str | None = None) -> str:
        """Return who asks, for the history.

        Args:
            authorization: The header of that name.
            origin: The header of that name, which only browsers send.

        Raises:
            Unauthorized: There is a token, and the request does not bring it.
            Forbidden: There is none, and the server listens to others than its own machine; or the
                request comes from a page of another site, that somebody here has open.
        """
        if self._token is not None:
            scheme, _, given = (authorization or "").partition(" ")
            # What a header holds was decoded by Latin-1, which has a character for each byte.
            same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._token)
            if scheme.lower() != "bearer" or not same:
                raise Unauthorized("changes need the admin token: Authorization: Bearer …")
            return "token"
        if not self._open:
            raise Forbidden(f"changes are off, since there is no token; {_SET}")
        if origin is not None and not is_loopback(_host(origin)):
            raise Forbidden(
                f"changes are not taken from a page of {origin!r} without a token; {_SET}"
            )
        return "local"


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a server that listens on a host."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _host(origin: str) -> str:
    try:
        return urlsplit(origin).hostname or ""
    except ValueError:
        return ""
