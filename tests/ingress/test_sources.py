import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from adapters.directory import Directory
from adapters.errors import StagingTooLarge
from deployments.errors import BadInput, Forbidden, NotReady, RequestError, TooLarge
from deployments.ingress.hub import is_public
from deployments.ingress.sources import Sources
from tests.ingress.hub import Hub, listen

Stage = Callable[..., tuple[dict[str, bytes], str]]


@pytest.fixture
def content(weights: Callable[[int], bytes]) -> dict[str, bytes]:
    return {
        "adapter_config.json": b"{}", "adapter_model.safetensors": weights(1), "task.json": b"{ }"
    }  # fmt: skip


@pytest.fixture
def stage(store: Directory) -> Stage:
    """Fetch a source; return what was staged, and the source's full name."""

    def stage(name: str, *allowed: str, max_bytes: int = 2**24) -> tuple[dict[str, bytes], str]:
        staging, source = Sources(allowed, store, max_bytes=max_bytes).stage(name)
        folder = store.root / ".staging" / staging / "files"
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        store.discard(staging)
        return files, source

    return stage


@pytest.fixture(autouse=True)
def _nothing_is_left(store: Directory) -> Iterator[None]:
    yield
    assert not (store.root / ".staging").exists() or os.listdir(store.root / ".staging") == []


def refused(kind: type[RequestError], stage: Stage, *args: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        stage(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()
    with listen(hub.answer, hub) as hub.endpoint:
        # What it reads from the environment when it is imported.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub
        close_session()


def test_a_hubs_revision_is_fetched_by_its_commit(
    hub: Hub, stage: Stage, content: dict[str, bytes], tmp_path: Path
) -> None:
    others = {"README.md": b"#", "optimizer.pt": b"x", "sub/task.json": b"y"}
    commit = hub.add("acme/mood", {**content, **others}, "main", "v1")
    for name in ("hf://acme/mood@v1", "hf://acme/mood", f"hf://acme/mood@{commit}"):
        assert stage(name, "hf://acme") == (content, f"hf://acme/mood@{commit}")
    fetched = [path for _, path, _ in hub.requests if "/resolve/" in path]
    assert {path.rpartition("/")[2] for path in fetched} == set(content)
    assert all(commit in path for path in fetched)
    assert not (tmp_path / "cache").exists()


def test_a_folder_of_a_repository_is_a_source(
    hub: Hub, stage: Stage, content: dict[str, bytes]
) -> None:
    files = {f"runs/best one/{name}": data for name, data in content.items()}
    commit = hub.add("acme/mood", {**files, "adapter_config.json": b"root"})
    name = "hf://acme/mood@main/runs/best one"
    assert stage(name, "hf://acme/mood@main") == (
        content, f"hf://acme/mood@{commit}/runs/best one"
    )  # fmt: skip
    assert "holds no adapter" in refused(BadInput, stage, "hf://acme/mood@main/runs", "hf://")


def test_the_token_goes_to_the_hub(
    hub: Hub, stage: Stage, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("acme/mood", content)
    hub.token = "hf_secret"
    said = refused(BadInput, stage, "hf://acme/mood", "hf://acme")
    assert "HF_TOKEN" in said
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert stage("hf://acme/mood", "hf://acme")[0] == content


def test_what_the_hub_does_not_have_is_said(
    hub: Hub, stage: Stage, content: dict[str, bytes]
) -> None:
    hub.add("acme/mood", content)
    assert "hf://acme/other" in refused(BadInput, stage, "hf://acme/other", "hf://acme")
    assert "'v9'" in refused(BadInput, stage, "hf://acme/mood@v9", "hf://acme")
    hub.status = 503
    assert "503" in refused(NotReady, stage, "hf://acme/mood", "hf://acme")


def test_a_hub_that_is_away_is_said(
    hub: Hub, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert "ConnectError" in refused(NotReady, stage, "hf://acme/mood", "hf://acme")


def test_a_torn_file_is_not_taken(hub: Hub, stage: Stage, content: dict[str, bytes]) -> None:
    hub.add("acme/mood", content)
    hub.cut = True
    refused(NotReady, stage, "hf://acme/mood", "hf://acme")


def test_a_file_shorter_than_listed_is_not_taken(
    hub: Hub, stage: Stage, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("acme/mood", {**content, "task.json": b"{}"})
    monkeypatch.setattr(Hub, "_info", _replaced(Hub._info, b'"size": 2}', b'"size": 3}'))
    assert "2 of 3 bytes" in refused(NotReady, stage, "hf://acme/mood", "hf://acme")


def test_a_repository_that_moved_needs_leave_for_its_new_name(
    hub: Hub, stage: Stage, content: dict[str, bytes]
) -> None:
    commit = hub.add("new/mood", content)
    hub.renamed["old/mood"] = "new/mood"
    said = refused(Forbidden, stage, "hf://old/mood@main", "hf://old")
    assert "hf://new/mood@main" in said
    assert [path for _, path, _ in hub.requests if "/resolve/" in path] == []
    found = stage("hf://old/mood@main", "hf://old", "hf://new/mood@main")
    assert found == (content, f"hf://new/mood@{commit}")


@pytest.mark.parametrize("route", ["info", "file"])
@pytest.mark.parametrize(
    "place",
    ["http://169.254.169.254", "http://127.0.0.1:{port}", "http://[::1]:{port}",
     "http://localhost:{port}", "http://[::ffff:127.0.0.1]:{port}", "http://2130706433:{port}",
     "http://0.0.0.0:{port}", "https://127.0.0.1:{port}",
     "http://127.0.0.1:1"],  # where nothing listens: nor may anybody find out
)  # fmt: skip
def test_a_redirect_to_where_only_the_server_gets_to_is_refused(
    hub: Hub, stage: Stage, content: dict[str, bytes], route: str, place: str
) -> None:
    commit = hub.add("acme/mood", content)
    inner = Hub()
    with listen(lambda *_: (200, {}, b"secret"), inner) as address:
        target = place.format(port=address.rpartition(":")[2])
        path = (
            "/api/models/acme/mood"
            if route == "info"
            else f"/acme/mood/resolve/{commit}/adapter_config.json"
        )
        hub.redirects[path] = f"{target}/latest"
        said = refused(Forbidden, stage, "hf://acme/mood", "hf://acme")
        assert "neither its own address nor a public one" in said
        assert inner.requests == []


def test_a_redirect_within_the_hub_is_followed(
    hub: Hub, stage: Stage, content: dict[str, bytes]
) -> None:
    commit = hub.add("acme/mood", content)
    name = "acme/mood/resolve"
    hub.add("cdn/x", {"y": content["task.json"]})
    hub.redirects[f"/{name}/{commit}/task.json"] = f"{hub.endpoint}/cdn/x/resolve/main/y"
    assert stage("hf://acme/mood", "hf://acme")[0] == content


def test_a_name_that_answers_otherwise_the_second_time_is_refused(
    hub: Hub, stage: Stage, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was connected to counts, not what a lookup said before."""
    commit = hub.add("acme/mood", content)
    inner, real = Hub(), socket.getaddrinfo
    asked = []

    def lookup(host: Any, *args: Any, **options: Any) -> Any:
        if host not in ("rebinding.test", b"rebinding.test"):
            return real(host, *args, **options)
        asked.append(host)
        return real("8.8.8.8" if len(asked) == 1 else "127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with listen(lambda *_: (200, {}, b"secret"), inner) as address:
        port = address.rpartition(":")[2]
        path = f"/acme/mood/resolve/{commit}/adapter_config.json"
        hub.redirects[path] = f"http://rebinding.test:{port}/"
        refused(Forbidden, stage, "hf://acme/mood", "hf://acme")
    assert len(asked) == 2
    assert inner.requests == []


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("64:ff9b::808:808", True),
        ("127.0.0.1", False), ("10.0.0.1", False), ("172.16.0.1", False), ("192.168.1.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
        ("255.255.255.255", False), ("::", False), ("::1", False), ("fe80::1%eth0", False),
        ("fd00::1", False), ("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("ff02::1", False),
    ],
)  # fmt: skip
def test_what_is_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_without_a_network_the_hubs_own_cache_serves(
    hub: Hub, stage: Stage, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {**content, **{f"sub/{name}": data for name, data in content.items()}}
    commit = hub.add("acme/mood", files)
    for name in files:
        huggingface_hub.hf_hub_download("acme/mood", name, endpoint=hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    num_requests = len(hub.requests)
    assert stage("hf://acme/mood", "hf://acme") == (content, f"hf://acme/mood@{commit}")
    assert stage("hf://acme/mood@main/sub", "hf://acme")[0] == content
    said = refused(BadInput, stage, "hf://acme/other", "hf://acme")
    assert "HF_HUB_OFFLINE" in said
    assert len(hub.requests) == num_requests


def test_the_endpoint_comes_from_the_environment(
    hub: Hub, content: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("acme/mood", content)
    code = (
        "import sys; from adapters.directory import Directory\n"
        "from deployments.ingress.sources import Sources\n"
        "store = Directory(sys.argv[1])\n"
        "print(Sources(['hf://acme'], store, max_bytes=2**20).stage('hf://acme/mood')[1])"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "other")],
        env=environment, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.startswith("hf://acme/mood@"), done.stderr


def test_nothing_is_allowed_unless_said(hub: Hub, stage: Stage) -> None:
    for name in ("hf://acme/mood", "s3://a/b", "gs://a/b", "file:///etc"):
        assert "allowed_sources" in refused(Forbidden, stage, name)
        assert "allowed_sources" in refused(Forbidden, stage, name, "hf://other", "s3://a/bc")
    assert hub.requests == []
    assert "is not a source" in refused(
        BadInput, stage, "https://huggingface.co/acme/mood", "hf://"
    )


def test_sizes_are_bounded_before_and_while_they_come(
    hub: Hub, stage: Stage, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    content["tokenizer.json"] = bytes(10_000)
    hub.add("acme/mood", content)
    assert "10100" in refused(TooLarge, stage, "hf://acme/mood", "hf://acme", max_bytes=10_100)
    assert [path for _, path, _ in hub.requests if "/resolve/" in path] == []
    monkeypatch.setattr(Hub, "_info", _replaced(Hub._info, b'"size"', b'"bytes"'))
    refused(TooLarge, stage, "hf://acme/mood", "hf://acme", max_bytes=10_100)
    assert [path for _, path, _ in hub.requests if "/resolve/" in path]
    hub.add("acme/mood", {**content, "task.json": bytes(8 * 2**20 + 1)})
    with pytest.raises(StagingTooLarge, match=r"task\.json"):
        stage("hf://acme/mood", "hf://acme")


def _replaced(info: Any, old: bytes, new: bytes) -> Any:
    def told(self: Hub, name: str, revision: str) -> Any:
        status, headers, body = info(self, name, revision)
        assert old in body
        return status, headers, body.replace(old, new)

    return told


def test_a_source_that_drips_is_left(
    hub: Hub, stage: Stage, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("acme/mood", content)
    monkeypatch.setattr("deployments.ingress.sources._MAX_FETCH_S", -1.0)
    assert "too slowly" in refused(NotReady, stage, "hf://acme/mood", "hf://acme")


@pytest.fixture
def folder(tmp_path: Path, content: dict[str, bytes]) -> Path:
    folder = tmp_path / "srv" / "adapters" / "mood"
    folder.mkdir(parents=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    (folder / "optimizer.pt").write_bytes(b"x")
    return folder


def test_a_folder_is_a_source(stage: Stage, folder: Path, content: dict[str, bytes]) -> None:
    assert stage(f"file://{folder}", f"file://{folder.parent}") == (content, f"file://{folder}")
    (folder.parent / "link").symlink_to("mood")
    assert stage(f"file://{folder.parent}/link/", f"file://{folder.parent}/")[0] == content
    assert "holds no adapter" in refused(
        BadInput, stage, f"file://{folder.parent}", f"file://{folder.parent}"
    )
    assert "holds no adapter" in refused(
        BadInput, stage, f"file://{folder}/none", f"file://{folder}"
    )


def test_no_link_leads_out_of_an_allowed_folder(stage: Stage, folder: Path, tmp_path: Path) -> None:
    allowed = f"file://{folder.parent}"
    (tmp_path / "secret.json").write_text("{}")
    (folder / "config.json").symlink_to(tmp_path / "secret.json")
    assert "config.json" in refused(Forbidden, stage, f"file://{folder}", allowed)
    (folder.parent / "away").symlink_to(tmp_path)
    refused(Forbidden, stage, f"{allowed}/away", allowed)


@pytest.fixture
def swap(folder: Path, content: dict[str, bytes], tmp_path: Path) -> Callable[[], None]:
    """Make the folder, once, a link to another one outside of what is allowed."""
    away = tmp_path / "away"
    away.mkdir()
    for name in content:
        (away / name).write_bytes(b"secret")

    def swap() -> None:
        if not folder.is_symlink():
            folder.rename(tmp_path / "moved")
            folder.symlink_to(away)

    return swap


def test_a_folder_that_becomes_a_link_as_it_is_opened_leads_nowhere(
    stage: Stage, folder: Path, swap: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def swapping(path: Any, *args: Any, **options: Any) -> int:
        if str(path).startswith(str(folder)):
            swap()
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", swapping)
    said = refused(Forbidden, stage, f"file://{folder}", f"file://{folder.parent}")
    assert "outside of allowed_sources, by a link" in said


def test_what_was_looked_at_is_what_is_read(
    store: Directory, stage: Stage, folder: Path, content: dict[str, bytes],
    swap: Callable[[], None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    take_in = store.stage

    def swapping(files: Any) -> str:
        swap()
        return take_in(files)

    monkeypatch.setattr(store, "stage", swapping)
    open_before = len(os.listdir("/proc/self/fd"))
    assert stage(f"file://{folder}", f"file://{folder.parent}")[0] == content
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_what_is_no_file_is_not_waited_for(stage: Stage, folder: Path) -> None:
    os.mkfifo(folder / "config.json")
    assert "not a file" in refused(BadInput, stage, f"file://{folder}", f"file://{folder}")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, content: dict[str, bytes]) -> Iterator[Any]:
    """A bucket of a real S3 API, and a client of it."""
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    for name, data in {**content, "optimizer.pt": b"x"}.items():
        client.put_object(Bucket="models", Key=f"prod/mood/{name}", Body=data)
    yield client
    client.close()
    S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_bucket_is_a_source(bucket: Any, stage: Stage, content: dict[str, bytes]) -> None:
    assert stage("s3://models/prod/mood", "s3://models/prod") == (
        content, "s3://models/prod/mood"
    )  # fmt: skip
    content["tokenizer.json"] = os.urandom(3 * 2**20 + 5)
    bucket.put_object(
        Bucket="models", Key="prod/mood/tokenizer.json", Body=content["tokenizer.json"]
    )
    assert stage("s3://models/prod/mood", "s3://models/prod")[0] == content
    refused(TooLarge, stage, "s3://models/prod/mood", "s3://models", max_bytes=2**20)
    assert "there is nothing" in refused(BadInput, stage, "s3://models/none", "s3://models")
    assert "there is nothing" in refused(BadInput, stage, "s3://other/none", "s3://other")
    assert "holds no adapter" in refused(BadInput, stage, "s3://models/prod", "s3://models")


def test_a_folder_of_a_bucket_is_not_listed(
    bucket: Any, stage: Stage, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have millions of objects."""
    from s3fs import S3FileSystem

    monkeypatch.setattr(S3FileSystem, "_lsdir", None)
    for name, data in {**content, "config.json/x": b"no file"}.items():
        bucket.put_object(Bucket="models", Key=f"large/mood/{name}", Body=data)
    assert stage("s3://models/large/mood", "s3://models")[0] == content


def test_a_store_whose_package_is_missing_is_said(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert "package" in refused(NotReady, stage, "gs://models/prod", "gs://models")
