"""The memory of this process: its peak, and giving back what was freed."""

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path


def reset_peak_memory() -> None:
    """Start a new high-water mark, where the system has one per process that can be reset (Linux)."""
    release_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def release_memory() -> None:
    """Give what was freed back to the system."""
    gc.collect()  # models refer to themselves
    with suppress(OSError, AttributeError, TypeError):  # glibc alone keeps gigabytes of what was freed
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory_mb() -> float:
    """Return the largest resident memory of this process since the last reset, where it can be reset.

    In MB of 2**20 bytes, as manifests and reports have it; 0 where the system does not tell.
    """
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)
    try:
        import resource
    except ImportError:  # Windows has neither
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024), 1)
