import os
import subprocess
import sys

import pytest

from deployments.model.allocator import CPU_MEMORY
from deployments.model.fp32 import has_onednn

# Two shapes of weights at 500 numbers of tokens each.
PRODUCTS = """
import os, torch

def mib():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

weights = [torch.ones(256, 1024), torch.ones(1024, 256)]
product = torch.ops.mkldnn._linear_pointwise
with torch.inference_mode():
    for num_tokens in (500, *range(1, 500)):
        for weight in weights:
            product(torch.ones(num_tokens, weight.shape[1]), weight, None, "none", [], "")
        if num_tokens == 500:
            before = mib()
    print(int(mib() - before))
"""

BLOCK_BYTES, ROUNDS = 100 * 2**20, 5
# Beside the main thread, as the forward runs; a bytearray is malloc and memset.
PROGRAM = f"""
import resource, threading

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    bytearray({BLOCK_BYTES})
    before = faults()
    for _ in range({ROUNDS}):
        bytearray({BLOCK_BYTES})
    print(faults() - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def told(program: str, **environment: str) -> int:
    plain = {name: value for name, value in os.environ.items() if name not in CPU_MEMORY}
    done = subprocess.run(
        [sys.executable, "-c", program], env=plain | environment, capture_output=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_large_blocks_are_had_again_without_page_faults() -> None:
    of_one = BLOCK_BYTES // os.sysconf("SC_PAGE_SIZE")
    assert told(PROGRAM, **CPU_MEMORY) < of_one / 10
    if told(PROGRAM) < ROUNDS * of_one / 10:
        pytest.skip("this machine's allocator, or its huge pages, never needed the settings")


@pytest.mark.skipif(not has_onednn(), reason="torch has no oneDNN here")
def test_products_of_every_number_of_tokens_take_little_memory() -> None:
    assert told(PRODUCTS, **CPU_MEMORY) < told(PRODUCTS) / 2  # 0.2 and 0.8 GiB
