import re
import time

import pytest

from adapters.pattern import PatternTooSlow, fullmatch, pattern_problem

PATHS = [
    "bert.encoder.layer.0.attention.self.query", "model.layers.11.mlp.down_proj", "classifier", "",
]  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(query|value)$", r".*(query|down_proj)", "classifier", r"^bert\..*",
        r".*\.\d{1,2}\..*",
        r"(?:.*?(?:self|mlp).*?(?:query|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)",
        r"(?!.*mlp).*", r"(?i).*QUERY", "", "[[a]",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_patterns_match_as_re_does(pattern: str) -> None:
    assert pattern_problem(pattern) is None
    for path in PATHS:
        assert fullmatch(pattern, path) == (re.fullmatch(pattern, path) is not None)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "is not a valid regular expression"),
        ("a**", "is not a valid regular expression"),
        ("(" * 4000 + ")" * 4000, "is not a valid regular expression"),
        ("a" * 10_001, "has 10001 characters, over the limit of 10000"),
        ("((a{999}){999}){999}", "repeats a part more than 100 times"),
        ("(a{1,50}){3}", "repeats a part more than 100 times"),
        ("a{" + "9" * 5000 + "}", "repeats a part more than 100 times"),
    ],
)
def test_what_cannot_be_meant_is_said_at_once(pattern: str, said: str) -> None:
    started_s = time.perf_counter()
    assert said in (pattern_problem(pattern) or "")
    assert time.perf_counter() - started_s < 1


def test_a_pattern_without_end_is_stopped() -> None:
    started_s = time.perf_counter()
    with pytest.raises(PatternTooSlow, match="does not come to an end"):
        fullmatch("(?:(?:[a-z]|[a-z.0-9])+)+[A-Z]", PATHS[0])
    assert time.perf_counter() - started_s < 5
