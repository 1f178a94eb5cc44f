"""Adapters at `hf://`, through huggingface_hub, and by all that it reads from the environment.

Files are streamed, not downloaded into the hub's cache: the store keeps them. So neither does that
cache grow nor a download go past our limits, and Xet's own client, whose requests nobody could
watch, has no part in it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterator
from functools import partial
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    set_client_factory,
)

from deployments.errors import BadInput, Forbidden, NotReady
from deployments.ingress.remote import CHUNK_BYTES, RemoteFile
from deployments.source import Source

_NAT64 = IPv6Network("64:ff9b::/96")


class Hub:
    """The hub that the environment names, asked by this process's one client for it."""

    def __init__(self) -> None:
        """Watch from now on where huggingface_hub connects to."""
        set_client_factory(_make_client)

    def find(self, source: Source, names: Collection[str]) -> tuple[Source, list[RemoteFile]]:
        """Return what the hub calls a source, by its commit, and those of its files. Blocks.

        Raises:
            BadInput: There is no such repository or revision, or the token may not read it.
            Forbidden: The hub sends us to an address that is not public.
            NotReady: The hub does not answer.
        """
        if constants.is_offline_mode():
            return self._find_cached(source, names)
        try:
            info = HfApi(library_name="onebase").model_info(
                source.repository,
                revision=source.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        except (httpx2.HTTPError, HFValidationError) as error:
            raise _said(source, error) from error
        revision = info.sha or source.revision or constants.DEFAULT_REVISION
        prefix = f"{source.folder}/" if source.folder else ""
        urls = {name: hf_hub_url(info.id, prefix + name, revision=revision) for name in names}
        listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        files = [
            RemoteFile(name, listed[prefix + name].size, partial(_stream, source, url))
            for name, url in urls.items()
            if prefix + name in listed
        ]
        return _resolved(source, info.id, revision), files

    def _find_cached(
        self, source: Source, names: Collection[str]
    ) -> tuple[Source, list[RemoteFile]]:
        """Offline: what somebody has downloaded into the hub's own cache."""
        try:
            root = snapshot_download(
                source.repository,
                revision=source.revision,
                local_files_only=True,
                allow_patterns=[os.path.join(source.folder, name) for name in names],
            )
        except (LocalEntryNotFoundError, HFValidationError):
            raise BadInput(
                f"{source} is not in the hub's local cache, and HF_HUB_OFFLINE lets nothing in"
            ) from None
        folder = os.path.join(root, source.folder)
        files = [
            RemoteFile(name, os.path.getsize(path), partial(_read, path))
            for name in names
            if os.path.isfile(path := os.path.join(folder, name))
        ]
        return _resolved(source, source.repository, os.path.basename(root)), files


def is_public(address: str) -> bool:
    """Tell whether an IP address is anybody's to reach, and so is the IPv4 address within it."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address):
        within = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            return is_public(str(ip_address(int(ip) & 0xFFFFFFFF)))
        if within is not None:
            return is_public(str(within))
    return ip.is_global and not ip.is_multicast


def _make_client() -> httpx2.Client:
    hooks = {"request": [_admit]}
    return httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=None)


def _admit(request: httpx2.Request) -> None:
    """Refuse a request, of which a redirect is one more, to where only we get to.

    The names are resolved here, and what was connected to is looked at once more before
    anything is sent there: a name may answer differently the second time.
    """
    url = request.url
    if constants.is_offline_mode():  # as the client does that this one stands for
        raise OfflineModeIsEnabled(f"HF_HUB_OFFLINE is set, and {url} is at the hub")
    if url.origin == httpx2.URL(constants.ENDPOINT).origin:
        return
    host = url.raw_host.decode("ascii")
    try:
        found = socket.getaddrinfo(host, url.port or 443, type=socket.SOCK_STREAM)
    except OSError:
        found = []  # the connection will say so, unless a proxy knows the name
    if not all(is_public(str(address[0])) for *_, address in found):
        raise _not_public(url)
    through_proxy = False

    def look(event: str, info: dict[str, Any]) -> None:
        nonlocal through_proxy
        if event.endswith("connect_tcp.started"):
            through_proxy = info["host"] != host
        elif event.endswith("connect_tcp.complete") and not through_proxy:
            stream = info["return_value"]
            if not is_public(stream.get_extra_info("server_addr")[0]):
                stream.close()
                raise _not_public(url)

    request.extensions["trace"] = look


def _stream(source: Source, url: str) -> Iterator[bytes]:
    headers = {**build_hf_headers(library_name="onebase"), "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield from response.iter_bytes(CHUNK_BYTES)
    except httpx2.HTTPError as error:
        raise _said(source, error) from error


def _read(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _resolved(source: Source, repository: str, revision: str) -> Source:
    folder = f"/{source.folder}" if source.folder else ""
    return Source("hf", f"{repository}@{revision}{folder}")


def _not_public(url: httpx2.URL) -> Forbidden:
    return Forbidden(
        f"the hub sends us to {url.scheme}://{url.netloc.decode('ascii')}, which is neither its "
        "own address nor a public one; nothing was read there"
    )


def _said(source: Source, error: Exception) -> BadInput | NotReady:
    response = getattr(error, "response", None)
    status = None if response is None else response.status_code
    if isinstance(error, RevisionNotFoundError):
        return BadInput(f"{source.repository} has no revision {source.revision!r} at the hub")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)) or status in (401, 403, 404):
        return BadInput(
            f"{source} is not at the hub, or not for us: see that its name is right, and that "
            "HF_TOKEN, where the server runs, may read it"
        )
    told = f"status {status}" if status else type(error).__name__
    return NotReady(f"{source} could not be fetched from the hub ({told}); try again")
