import os
import subprocess
import sys

import pytest

from deployments.model.allocator import KEEP_FREED_MEMORY

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


def page_faults(**environment: str) -> int:
    plain = {name: value for name, value in os.environ.items() if name not in KEEP_FREED_MEMORY}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=plain | environment, capture_output=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_large_blocks_are_had_again_without_page_faults() -> None:
    of_one = BLOCK_BYTES // os.sysconf("SC_PAGE_SIZE")
    assert page_faults(**KEEP_FREED_MEMORY) < of_one / 10
    if page_faults() < ROUNDS * of_one / 10:
        pytest.skip("this machine's allocator, or its huge pages, never needed the settings")
