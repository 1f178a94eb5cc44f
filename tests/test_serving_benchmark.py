"""The serving benchmark asks all that it should, and tells what was found."""

import importlib
import json
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record, serving, traffic
from benchmarks.servers import free_port, served
from benchmarks.serving_told import GUIDE, IDIOM, IDIOM_FAST, OURS, OURS_INT8


def load(per_s: float, p50_ms: float = 10.0, p95_ms: float = 20.0) -> dict[str, float]:
    return {"per_s": per_s, "failed": 0, "generator_cpu": 0.01} | {
        "p50_ms": p50_ms,
        "p95_ms": p95_ms,
        "p99_ms": 2 * p95_ms,
    }


def a_round(per_s: float, rate: float) -> dict[str, Any]:
    tried = [{"rate": part * rate, **load(part * rate)} for part in (0.25, 0.5, 1.0)]
    return {"closed": load(per_s), "single": load(100, 9.0), "rate": rate, "open": tried}


# Slow machines slow all: the third round has half of everything, and all the same ratios.
SPEEDS = {GUIDE: 90.0, IDIOM: 60.0, IDIOM_FAST: 100.0, OURS: 270.0, OURS_INT8: 450.0}
ROWS: list[dict[str, Any]] = [
    {
        "part": "generator",
        "closed": load(50_000),
        "open": {"rate": 1000.0, **load(990, 0.2, 0.7)},
        "cpu_us": 12.0,
    },
    *(
        {
            "part": "systems",
            "system": name,
            "rounds": [a_round(slow * speed, slow * speed / 2) for slow in (1.0, 1.1, 0.5)],
        }
        for name, speed in SPEEDS.items()
    ),
    {
        "part": "no-op",
        "runs": {"hop": [load(500)] * 3, "here": [load(1000)] * 3},
        "ratio": 0.5,
        "cpu_us": {
            "hop": {"Ingress": 1100.0, "Model": 600.0, "haproxy": 100.0},
            "here": {"Ingress": 400.0, "Model": 4.0, "haproxy": 70.0},
        },
    },
    *(
        {
            "part": part,
            "quantization": quantization,
            "runs": {of: [load(300, p95_ms=40)] * 3, to: [load(310, p95_ms=20)] * 3},
            "bulk_texts_per_s": 123.0,
            "ratio": ratio,
        }
        for part, of, to, ratio in (
            ("adapters", "64", "1", 0.968),
            ("bulk", "beside", "alone", 2.0),
        )
        for quantization in ("none", "int8")
    ),
    *(
        {
            "part": "fan-out",
            "quantization": quantization,
            "runs": {"at once": [load(50, 21.0)] * 3, "singly": [load(150, 7.0)] * 3},
            "ratio": 0.3,
            "closed": load(60),
            "rate": rate,
            "open": [{"rate": rate, **load(rate)}],
        }
        for quantization, rate in (("none", 41.0), ("int8", 62.0))
    ),
]


def cells(text: str) -> dict[str, list[str]]:
    """The cells of each line of the tables, by the first."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in lines}


def test_systems_are_compared_with_the_peers_of_the_same_round() -> None:
    found = cells(serving.as_table(ROWS))
    assert found[OURS][0] == "270/s"
    assert found[OURS][2:4] == ["3.00", "4.50"]
    assert found[OURS_INT8][2:4] == ["5.00", "7.50"]
    assert found[GUIDE][2] == "1.00"
    assert found[OURS][4:] == ["9.0 ms", "135/s"]
    other = json.loads(json.dumps(ROWS))
    other[1]["rounds"][0]["closed"]["per_s"] = 45.0  # the guide's, in one round of three
    assert cells(serving.as_table(other))[OURS][2] == "3.00"
    for a_rounds in other[1]["rounds"]:
        a_rounds["closed"]["per_s"] = 45.0
    assert cells(serving.as_table(other))[OURS][2] == "6.00"


def test_what_is_compared_within_ours_has_both_sides_and_the_ratio() -> None:
    found = cells(serving.as_table(ROWS))
    assert found["no-op forward by no call, requests/s"] == ["500", "1000", "0.50"]
    assert found["64 adapters by 1, requests/s, int8"] == ["300", "310", "0.97"]
    beside = "singles beside 512 texts by singles alone, p95 in ms, fp32"
    assert found[beside] == ["40", "20", "2.00"]
    assert found["no call"] == ["400 µs", "4 µs", "70 µs"]
    assert "50,000 requests a second and 12 µs" in serving.as_table(ROWS)


def test_fan_out_is_told_against_requests_one_after_another_and_with_its_rate() -> None:
    found = cells(serving.as_table(ROWS))
    what = "10 tasks of one text at once by 10 requests, p50 in ms, fp32"
    assert found[what] == ["21.0", "70.0", "0.30"]
    assert found["requests for 10 tasks, Poisson, p95 ≤ 100 ms, fp32"][0] == "41/s"
    assert found["requests for 10 tasks, Poisson, p95 ≤ 100 ms, int8"][0] == "62/s"


def test_the_short_line_names_the_peers_and_the_factors() -> None:
    said = serving.in_short(ROWS)
    assert "270 requests a second in fp32 and 450 in int8, beside 90 of the guide's" in said
    assert "(3.0x, 5.0x)" in said
    assert "135 and 225 a second may come at random" in said


def test_the_plot_is_drawn(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with `make bench`")
    plot = importlib.import_module("benchmarks.plot")
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    drawn = plot.save_plot("serving", ROWS).read_text()
    assert all(name in drawn for name in SPEEDS)


def test_every_system_is_asked_the_same_texts_in_the_same_order() -> None:
    pairs = traffic.asked()
    assert len(pairs) > 500
    assert {task for task, _ in pairs} == set(traffic.TASKS)
    assert len(traffic.TASKS) >= 5
    assert len(pairs) == len(set(pairs))
    for (task, text), *sent in zip(
        pairs, traffic.ours(pairs), traffic.guide(pairs), traffic.idiom(pairs), strict=False
    ):
        own, guide, idiom = (request.partition(b"\r\n\r\n") for request in sent)
        assert f"POST /v1/tasks/{task}/predict ".encode() in own[0]
        assert f"serve_multiplexed_model_id: {task}".encode() in idiom[0]
        assert json.loads(own[2]) == json.loads(guide[2]) == {"texts": [text]}
        assert json.loads(idiom[2]) == {"text": text}


def test_every_question_is_asked_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that answers anything at once, in the place of all: what is left is ours."""
    started = []

    def in_its_place(command: list[str], port: int, probe: bytes, more: Any = None) -> Any:
        started.append([*command])
        return served(["-m", "benchmarks.peers.trivial", str(port)], port, probe)

    monkeypatch.setattr(serving, "served", in_its_place)
    for name in ("WARM_S", "CLOSED_S", "SINGLE_S", "OPEN_S", "TURN_S", "BULK_S"):
        monkeypatch.setattr(serving, name, 0.2)
    monkeypatch.setattr(serving, "ROUNDS", 1)
    monkeypatch.setattr(serving, "TURNS", 1)
    monkeypatch.setattr(serving, "BULK_TURNS", 1)
    monkeypatch.setattr(serving, "highest_rate", lambda *_: (1.0, [{"rate": 1.0, **load(1)}]))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.save("serving", [*serving.measure()], {"cores": 2})
    rows = record.read("serving")
    assert [row["part"] for row in rows] == (
        ["generator"] + 5 * ["systems"] + ["no-op"] + 2 * ["adapters", "bulk", "fan-out"]
    )
    assert all(row["ratio"] > 0 for row in rows[6:])
    modules = [command[1] for command in started]
    assert modules.count("benchmarks.peers.guide") == 1
    assert modules.count("benchmarks.peers.ray_idiom") == 2
    assert modules.count("deployments") == 2 + 1 + 3 * 2
    assert len(cells(serving.as_table(rows))) > 15
    assert serving.in_short(rows)


def test_a_rate_is_held_while_p95_is_low_and_nothing_fails() -> None:
    port, request = free_port(), traffic.of_ours("spam", ["x"])
    serving_it = served(["-m", "benchmarks.peers.trivial", str(port)], port, request)
    with serving_it, pytest.MonkeyPatch.context() as patched:
        patched.setattr(serving, "OPEN_S", 0.5)
        rate, curve = serving.highest_rate(port, cycle([request]), 40.0)
        assert rate == pytest.approx(48)
        assert [one["rate"] for one in curve] == [10, 20, pytest.approx(48)]
        patched.setattr(serving, "MAX_P95_MS", 0.0)
        assert serving.highest_rate(port, cycle([request]), 40.0)[0] == 0
