import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.config import Args, ConfigError
from deployments.source import Source, is_allowed

PREFIXES = ["hf://acme", "hf://solo/mood@v1", "s3://models/prod", "gs://b", "file:///srv/adapters"]


def allowed(name: str, *prefixes: str) -> bool:
    return is_allowed(Source.parse(name), map(Source.parse_prefix, prefixes or PREFIXES))


@pytest.mark.parametrize(
    "name",
    [
        "hf://acme/mood", "hf://acme/mood@main", "hf://acme/mood@0a1b2c/best/run-1", "HF://acme/mood",
        "hf://acme/mood/", "hf://solo/mood@v1", "hf://solo/mood@v1/sub", "s3://models/prod",
        "s3://models/prod/x=1/a b", "gs://b", "gs://b/x@y", "file:///srv/adapters/größe/",
        "File:///srv/adapters",
    ],
)  # fmt: skip
def test_what_lies_below_a_prefix_is_allowed(name: str) -> None:
    assert allowed(name)


@pytest.mark.parametrize(
    "name",
    [
        "hf://acme2/mood", "hf://ACME/mood", "hf://other/acme", "hf://solo/mood", "hf://solo/mood@v12",
        "hf://solo/mood@v1.1", "hf://solo/mood@main", "hf://solo/mood-2@v1", "s3://models/production",
        "s3://models", "s3://models-evil/prod", "s3://other/models/prod", "gs://bb", "gs://models/prod",
        "file:///srv/adapters2", "file:///srv", "file:///etc/srv/adapters",
    ],
)  # fmt: skip
def test_what_lies_beside_every_prefix_is_not(name: str) -> None:
    assert not allowed(name)


@pytest.mark.parametrize(
    "name",
    [
        "", "mood", "https://acme/mood", "http://169.254.169.254/x", "memory://x", "hf:/acme/mood",
        "s3:models/prod", "://acme/mood", "hf://", "hf://acme", "s3://", "file://", "file:///",
        "hf://acme/mood@", "hf://acme/mood@a@b", "hf://ac@me/mood", "hf://acme/mood/a@b",
        "hf://acme/../solo/mood", "hf://acme/mood@v1/..", "hf://acme/mood/.", "hf://acme//mood",
        "s3://models/prod/../dev", "s3://models/prod/%2e%2e/dev", "s3://models/prod/..%2fdev",
        "s3://models/prod\\..\\dev", "s3://models/prod//x", "s3://models/prod/x//",
        "s3://user:pass@models/prod", "s3://models@evil/prod", "s3://models:9000/prod",
        "s3://models/prod?versionId=1", "s3://models/prod#x", "s3://models/prod/*",
        "s3://models/prod/[a]", "s3://models/prod/x::file:///etc", "s3://Models/prod",
        "file://srv/adapters", "file://localhost/srv/adapters", "file:///srv/adapters/../x",
        "file:///srv/adapters/\x00", "file:///srv/adapters/a\nb", "file:///srv/adapters/ x",
        " s3://models/prod", "s3 ://models/prod", "hf://-acme/mood", "hf://acme/mood@refs/../x",
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_none(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not|names no|is neither|not taken|has an @"
    ) as caught:
        Source.parse(name)
    assert "\n" not in str(caught.value)


def test_the_shortest_prefixes_allow_all_of_their_kind_and_no_other() -> None:
    assert allowed("hf://any/thing", "hf://")
    assert allowed("file:///any/thing", "file:///")
    assert not allowed("s3://any/thing", "hf://", "gs://", "file:///")


def test_a_hub_name_has_parts() -> None:
    source = Source.parse("hf://acme/mood@v1.0/best/run")
    assert (source.repository, source.revision, source.folder) == ("acme/mood", "v1.0", "best/run")
    assert str(source) == "hf://acme/mood@v1.0/best/run"
    source = Source.parse("hf://acme/mood/")
    assert (source.repository, source.revision, source.folder) == ("acme/mood", None, "")


@given(st.text(st.sampled_from("ab./@%\\ :~-s3:"), max_size=20))
def test_whatever_is_allowed_stays_below_its_prefix(rest: str) -> None:
    """Read as a path by somebody else, what was taken is still in the folder."""
    import os.path

    try:
        source = Source.parse(f"s3://models/prod/{rest}")
    except ValueError:
        return
    assert is_allowed(source, [Source.parse_prefix("s3://models/prod")])
    path = os.path.normpath(source.path)
    assert (path + "/").startswith("models/prod/")
    assert path == source.path


def test_the_configuration_takes_prefixes_and_names_what_is_none() -> None:
    given = {"base_model": "org/base@main", "adapter_store": "."}
    assert Args.model_validate(given).allowed_sources == ()
    args = Args.model_validate({**given, "allowed_sources": "hf://acme, s3://models/prod"})
    assert args.allowed_sources == ("hf://acme", "s3://models/prod")
    for wrong in ("acme", "https://x", "s3://a/../b", "hf://a@b"):
        with pytest.raises(ConfigError, match="allowed_sources: ") as caught:
            Args.model_validate({**given, "allowed_sources": [wrong]})
        assert wrong in str(caught.value)
