"""An adapter takes little more of the bank than its own tensors, however narrow or wide it is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.directory import Directory
from benchmarks.resident import fleet, own_bytes, save_adapter
from deployments.model.engine import Engine

FEW = (
    "q,v r=1",
    "q,k,v r=8",
    "all-linear r=64",
    "DoRA q,v r=1",
    "DoRA all-linear r=16",
    "IA3, 2 labels",
    "IA3, 40 labels",
)


def test_a_resident_adapter_takes_at_most_half_more_than_its_own_bytes(
    example_base: str, example_engine: Callable[[str], Engine], tmp_path: Path
) -> None:
    engine, store = example_engine("none"), Directory(tmp_path)
    chosen = [(config, labels) for name, config, labels in fleet() if name in FEW]
    assert len(chosen) == len(FEW)
    sizes = set()
    for index, (config, labels) in enumerate(chosen):
        save_adapter(example_base, tmp_path / f"t{index}", config, labels)
        files = store.read(f"t{index}")
        loaded, own = engine.read(files), own_bytes(engine, files)
        assert own <= loaded.num_bytes <= 1.5 * own
        # What the file has, and at most a gain for DoRA's magnitude: nothing is left out of `own`.
        assert own == pytest.approx(loaded.artifact.num_bytes, rel=0.01)
        free = engine.encoder.bank._free.num_free
        engine.write(100, loaded)
        taken = free - engine.encoder.bank._free.num_free
        assert taken * engine.encoder.bank.page_bytes == loaded.num_bytes
        engine.encoder.bank.forget(100)
        sizes.add(own)
    assert max(sizes) > 100 * min(sizes)
