"""`make bench-gpu` runs from end to end: here on a CPU, with bases of two layers."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from transformers import BertConfig

from benchmarks import gpu, gpu_peers
from benchmarks.gpu import Base, Sizes, as_table, llama, measure
from benchmarks.gpu_peers import Job, Work
from benchmarks.peers import NotRun


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # Two threads on two busy cores mostly wait for each other.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def there(job: Job) -> Iterator[tuple[str, Work]]:
    assert job.ids.shape == (4, 6)
    assert [path.name for path in job.adapters] == ["a0", "a1"]
    assert all((path / "adapter_model.safetensors").exists() for path in job.adapters)
    yield "1.2", lambda: None


def not_there(_: Job) -> AbstractContextManager[tuple[str, Work]]:
    raise NotRun("it is elsewhere")


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_it_measures_every_base_and_tells_it_in_one_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_peers, "PEERS", {"vLLM": there, "TEI": not_there})
    bert = BertConfig(**TINY, intermediate_size=48, vocab_size=64, max_position_embeddings=40)
    sizes = Sizes(
        bases=(
            Base("BERT", bert, ("query", "value"), 2**20),
            llama("Llama", 32, 2, 4, 48, 2**20),
        ),
        weighed=llama("larger", 64, 2, 4, 96, 0),
        quantizations=("none", "nf4"),
        num_rows=4,
        num_tokens=6,
        counts=(1, 2, 9),
        num_different=2,
        rounds=2,
        warm=1,
    )
    rows = list(measure(torch.device("cpu"), sizes))
    assert [(row["base"], row.get("quantization")) for row in rows] == [
        ("BERT", "none"), ("BERT", "nf4"), ("Llama", "none"), ("Llama", "nf4"), ("larger", None),
    ]  # fmt: skip
    for row in rows[:-1]:
        peft = {"PEFT mixed", "vLLM"} if row["quantization"] == "none" else set()
        assert set(row["of_plain"]) == {"k=1", "k=2", "k=9", "merged"} | peft
        assert set(row["median_ms"]) == {"plain", *row["of_plain"]}
        assert all(share > 0 for share in row["of_plain"].values())
        assert row["slot_write_us"] > 0
        assert row["adapter_bytes"] * 9 < 2**20
    assert 0 < rows[-1]["nf4"] < 1
    lines = as_table(rows).splitlines()
    assert lines[0].startswith(
        "| base | in | plain ms | k=1 | k=2 | k=9 | merged | PEFT mixed | vLLM | slot write"
    )
    assert rows[0]["peers"] == {"vLLM": "1.2"}
    assert len(lines) == 2 + 5 + 1
    assert lines[-1].startswith("| TEI: BERT, Llama | not run: it is elsewhere | – |")


@pytest.mark.parametrize(("num_rows", "count"), [(4, 9), (4, 2), (4, 4), (64, 1000), (64, 256)])
def test_a_batch_has_as_many_adapters_as_it_has_rows_or_as_there_are(
    num_rows: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(gpu, "_run", lambda _, rows: seen.extend(row.slot for row in rows))
    works = gpu._ours(None, torch.full((num_rows, 3), 5), Sizes(counts=(count,)))
    works[f"k={count}"]()
    assert len(set(seen)) == min(num_rows, count)
    assert set(seen) <= set(range(1, 1 + count))


def test_the_decoders_are_as_large_as_they_are_called() -> None:
    sizes = Sizes()
    for base, least, most in ((sizes.bases[1], 1e9, 2e9), (sizes.weighed, 6.5e9, 8e9)):
        with torch.device("meta"):
            model = gpu.AutoModel.from_config(base.config)
        assert least < sum(p.numel() for p in model.parameters()) < most


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence() -> None:
    with pytest.raises(SystemExit, match="bench-gpu needs a CUDA device"):
        gpu.main()
