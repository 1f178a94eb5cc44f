import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# In a process of its own: the Rust library makes its pool once, for whoever comes first.
SCRIPT = """
import asyncio, json, os, sys, zlib
from pathlib import Path
from deployments.config import Args
from deployments.ingress.deployment import Ingress

class Pages:
    async def remote(self, page):
        return pages[page]

class Model:
    vocabulary_page = Pages()

class Poll:
    async def remote(self, *args):
        await asyncio.sleep(600)

class Catalog:
    poll = Poll()

backend = json.loads(Path("examples/base/tokenizer.json").read_text())
backend |= {"truncation": None, "padding": None}
vocabulary = {
    "backend": json.dumps(backend), "max_length": 128, "truncation_side": "right",
    "split_special_tokens": False, "type_ids": True, "unk_id": 100,
}
pages = [zlib.compress(json.dumps(vocabulary).encode()), b""]
args = Args(base_model="examples/base", adapter_store="examples/store")

async def main():
    ingress = object.__new__(Ingress)
    await ingress.__init__(Model(), Catalog(), args)
    if sys.argv[1] == "ours-undone":
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
    before = len(os.listdir("/proc/self/task"))
    encoded = ingress._predictor.runs._tokenizer.encode(["a lovely film"] * 2000, 128)
    print(json.dumps([len(encoded), len(os.listdir("/proc/self/task")) - before]))

asyncio.run(main())
"""


@pytest.mark.parametrize("way", ["ours", "ours-undone"])
def test_a_text_is_tokenised_in_the_thread_that_asks(way: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, way], cwd=ROOT, capture_output=True, text=True, check=True
    )
    num_encoded, num_more = json.loads(done.stdout.splitlines()[-1])
    assert num_encoded == 2000
    assert (num_more == 0) is (
        way == "ours"
    )  # the other way a pool as large as the machine is made
