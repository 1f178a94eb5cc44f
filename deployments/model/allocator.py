"""What glibc's allocator must be told before a process starts that computes on a CPU.

An activation of 32 rows x 64 tokens x 3,072 is 25 MB. By default glibc gives such a block back to
the kernel when it is freed, and fetches it again in zeroed pages of 4 KB with a fault each: a
quarter to almost half of an int8 forward (docs/adr/0004). Arenas beside the first hold no block
over 64 MB, and the forward has a thread of its own, so there is one arena. The price: a replica's
memory stays at its peak, which its largest batch sets.
"""

from __future__ import annotations

_KEPT_BYTES = 2**30  # Blocks up to this size are kept, and so much free memory at the end.

# Read at a process's start alone. Other C libraries and allocators ignore it.
KEEP_FREED_MEMORY = {
    "GLIBC_TUNABLES": ":".join(
        (
            "glibc.malloc.arena_max=1",
            f"glibc.malloc.mmap_threshold={_KEPT_BYTES}",
            f"glibc.malloc.trim_threshold={16 * _KEPT_BYTES}",
        )
    )
}
