"""How the C library treats memory that a CPU's tensors free and take again, step after step."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to 32 MiB in the process; False where the C library is another.

    By default it gives what is free at the end of the heap back to the system, which hands every page of it out anew
    and cleared in the next step: 75,000 page faults and a tenth of the time of a step of 8 M parameters.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    settings = (_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_TRIM_THRESHOLD, _NEVER)
    return all(library.mallopt(*each) for each in settings)
