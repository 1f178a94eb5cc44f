"""What glibc and oneDNN must be told of memory before a process starts that computes on a CPU.

An activation of 32 rows x 64 tokens x 3,072 is 25 MB. By default glibc gives such a block back to
the kernel when it is freed, and fetches it again in zeroed pages of 4 KB with a fault each: a
quarter to almost half of an int8 forward (docs/adr/0004). Arenas beside the first hold no block
over 64 MB, and the forward has a thread of its own, so there is one arena. The price: a replica's
memory stays near its peak, which its largest batch sets.

oneDNN keeps what it made for a product of so many tokens by a weight of such a shape: code and room
to work in, 2.4 MiB in the mean of BERT-base's shapes in fp32. It would keep 1,024 of them, and
torch's bridge to it as many: gigabytes for a base that sees batches of every size (docs/adr/0013).
Making one anew takes 0.6 ms, once a forward for each shape.
"""

from __future__ import annotations

_KEPT_BYTES = 2**30  # Blocks up to this size are kept, and so much free memory at the end.

# Of products; MiniLM's three shapes at 40 numbers of tokens.
_MOST_KERNELS = 128

# Read at a process's start alone. Other C libraries and allocators ignore what is not for them.
CPU_MEMORY = {
    "GLIBC_TUNABLES": ":".join(
        (
            "glibc.malloc.arena_max=1",
            f"glibc.malloc.mmap_threshold={_KEPT_BYTES}",
            f"glibc.malloc.trim_threshold={16 * _KEPT_BYTES}",
        )
    ),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(_MOST_KERNELS),
    "LRU_CACHE_CAPACITY": str(_MOST_KERNELS),
}
