"""How `benchmarks.serving` is told: tables, plot, README's line. From what was saved alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.record import table

GUIDE, IDIOM, IDIOM_FAST = "the guide's server", "Ray's idiom", "Ray's idiom, HAProxy"
OURS, OURS_INT8 = "ours", "ours, int8"
MAX_P95_MS, CONNECTIONS, ADAPTERS, BULK = 100.0, 32, 64, 512
FANNED = 10


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    systems = _systems(rows)
    columns = ["", f"{CONNECTIONS} connections", "p95", "by the guide's", "by Ray's idiom"]
    columns += ["1 connection, p50", f"Poisson, p95 ≤ {MAX_P95_MS:.0f} ms"]
    lines = [
        [
            name,
            f"{_median(found, 'closed', 'per_s'):.0f}/s",
            f"{_median(found, 'closed', 'p95_ms'):.0f} ms",
            f"{against(systems, name, GUIDE):.2f}",
            f"{against(systems, name, IDIOM):.2f}",
            f"{_median(found, 'single', 'p50_ms'):.1f} ms",
            f"{statistics.median(one['rate'] for one in found):.0f}/s",
        ]
        for name, found in systems.items()
    ]
    return "\n\n".join([table(columns, lines), _within(rows), _cpu(rows), _generator(rows)])


def _within(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        kind = {"none": ", fp32", "int8": ", int8"}.get(row.get("quantization", ""), "")
        if row["part"] == "no-op":
            lines.append(
                ["no-op forward by no call, requests/s", *_pair(row, "per_s", "hop", "here")]
            )
        elif row["part"] == "adapters":
            what = f"{ADAPTERS} adapters by 1, requests/s{kind}"
            lines.append([what, *_pair(row, "per_s", "64", "1")])
        elif row["part"] == "bulk":
            what = f"singles beside {BULK} texts by singles alone, p95 in ms{kind}"
            lines.append([what, *_pair(row, "p95_ms", "beside", "alone")])
            given = f"{row['bulk_texts_per_s']:.0f}/s"
            lines.append([f"texts a second of the {BULK} beside them{kind}", given, "", ""])
        elif row["part"] == "fan-out":
            what = f"{FANNED} tasks of one text at once by {FANNED} requests, p50 in ms{kind}"
            one, ten = (_p50(row["runs"][name]) for name in ("at once", "singly"))
            lines.append([what, f"{one:.1f}", f"{FANNED * ten:.1f}", f"{row['ratio']:.2f}"])
            what = f"requests for {FANNED} tasks, Poisson, p95 ≤ {MAX_P95_MS:.0f} ms{kind}"
            lines.append([what, f"{row['rate']:.0f}/s", "", ""])
    return table(["within ours", "", "against", "ratio"], lines)


def _cpu(rows: Sequence[dict[str, Any]]) -> str:
    (row,) = (row for row in rows if row["part"] == "no-op")
    parts = sorted({part for taken in row["cpu_us"].values() for part in taken})
    names = {"hop": "no-op forward", "here": "no call"}
    lines = [
        [name, *(f"{row['cpu_us'][which].get(part, 0):.0f} µs" for part in parts)]
        for which, name in names.items()
    ]
    return table(["CPU a request", *parts], lines)


def _generator(rows: Sequence[dict[str, Any]]) -> str:
    (row,) = (row for row in rows if row["part"] == "generator")
    return (
        f"The load generator itself, against a server that does nothing: "
        f"{row['closed']['per_s']:,.0f} requests a second and {row['cpu_us']:.0f} µs of a CPU a "
        f"request; in the open loop at {row['open']['rate']:,.0f}/s its p95 is "
        f"{row['open']['p95_ms']:.1f} ms."
    )


def draw(rows: Sequence[dict[str, Any]], figure: Any) -> None:
    axes = figure.subplots()
    for name, found in _systems(rows).items():
        middle = sorted(found, key=lambda one: one["rate"])[len(found) // 2]
        points = [one for one in middle["open"] if not one["failed"]]
        (line,) = axes.plot(
            [one["rate"] for one in points],
            [one["p95_ms"] for one in points],
            marker="o",
            markersize=3,
            label=name,
        )
        axes.plot(
            [one["rate"] for one in points],
            [one["p50_ms"] for one in points],
            linestyle=":",
            color=line.get_color(),
        )
    axes.axhline(MAX_P95_MS, color="black", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel("requests/s, arriving as a Poisson process, one text each, five tasks mixed")
    axes.set_ylabel("latency in ms: p95, dotted p50")
    axes.legend()


def in_short(rows: Sequence[dict[str, Any]]) -> str:
    systems = _systems(rows)
    rate = {name: _median(found, "closed", "per_s") for name, found in systems.items()}
    held = {name: statistics.median(o["rate"] for o in found) for name, found in systems.items()}
    return (
        f"Over HTTP, one text a request, five tasks mixed, {CONNECTIONS} connections, load "
        f"generator included: {rate[OURS]:.0f} requests a second in fp32 and "
        f"{rate[OURS_INT8]:.0f} in int8, beside {rate[GUIDE]:.0f} of the guide's server for one "
        f"task ({against(systems, OURS, GUIDE):.1f}x, {against(systems, OURS_INT8, GUIDE):.1f}x), "
        f"{rate[IDIOM]:.0f} of Ray's own idiom and {rate[IDIOM_FAST]:.0f} of that with HAProxy and "
        f"throughput mode; {held[OURS]:.0f} and {held[OURS_INT8]:.0f} a second may come at random "
        f"with p95 at most {MAX_P95_MS:.0f} ms."
    )


def against(systems: dict[str, list[dict[str, Any]]], name: str, peer: str) -> float:
    """Median over the rounds of one's requests a second by the peer's of the same round."""
    return statistics.median(
        own["closed"]["per_s"] / other["closed"]["per_s"]
        for own, other in zip(systems[name], systems[peer], strict=True)
    )


def _systems(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {row["system"]: row["rounds"] for row in rows if row["part"] == "systems"}


def _p50(runs: Sequence[dict[str, float]]) -> float:
    return statistics.median(one["p50_ms"] for one in runs)


def _median(found: Sequence[dict[str, Any]], load: str, key: str) -> float:
    return statistics.median(one[load][key] for one in found)


def _pair(row: dict[str, Any], key: str, of: str, to: str) -> list[str]:
    values = [statistics.median(one[key] for one in row["runs"][name]) for name in (of, to)]
    return [*(f"{value:.0f}" for value in values), f"{row['ratio']:.2f}"]
