"""What this machine has: cores, instruction sets, memory, disk, GPUs. Read from the system, without torch.

``root`` is where the system's own files are looked for.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
_CGROUPS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")  # of version 2, alone or beside version 1
_BF16 = frozenset({"amx_bf16", "avx512_bf16", "bf16", "FEAT_BF16"})
_SECONDS = 10


@dataclass(frozen=True)
class Memory:
    """Bytes that this process may have, and that are free for it now."""

    total: int
    available: int


def memory_bytes(root: Path = _ROOT) -> Memory | None:
    """Return the machine's memory, or what a container's limit leaves of it; None where it cannot be read."""
    machine = _machine_memory(root)
    if machine is None:
        return None
    total, available = machine.total, machine.available
    for limit, used in _memory_limits(root):
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return Memory(total, available)


def _machine_memory(root: Path) -> Memory | None:
    with suppress(OSError, ValueError, KeyError):
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
        return Memory(1024 * kilobytes["MemTotal"], 1024 * kilobytes["MemAvailable"])
    if sys.platform == "win32":
        return _windows_memory()
    with suppress(OSError, ValueError):  # macOS: what is free there is mostly cache, and not told
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Memory(total, total)
    return None


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of the control groups that this process is in, as far as they are visible.

    Pages of files that have not been used for a while count as free: the kernel drops them first.
    """
    for folder, version in _control_groups(root, "memory"):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")  # noqa: PLR2004
        with suppress(OSError, ValueError):  # "max" is no limit
            limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names)
            words = (folder / "memory.stat").read_text(encoding="ascii").split()
            stat = dict(zip(words[::2], words[1::2], strict=False))
            cold = stat.get("inactive_file" if version == 2 else "total_inactive_file", "0")  # noqa: PLR2004
            yield limit, used - int(cold)


def _control_groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the folders of the control groups this process is in, and their version (1 or 2).

    A container often sees its own group as the topmost one under another name: folders that are not there are
    passed over, their parents are not.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                mounts, version = [root / mount for mount in _CGROUPS], 2
            elif controller in controllers.split(","):
                mounts, version = [root / _CGROUPS[0] / name for name in (controller, controllers)], 1
            else:
                continue
            inside = Path(path.lstrip("/"))
            for mount in dict.fromkeys(mounts):
                yield from ((mount / part, version) for part in (inside, *inside.parents) if (mount / part).is_dir())


def cores(root: Path = _ROOT) -> int:
    """Return how many cores this process may use: affinity and a container's quota included."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for folder, version in _control_groups(root, "cpu"):
        with suppress(OSError, ValueError):
            if version == 2:  # noqa: PLR2004
                quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            else:
                quota, period = (
                    (folder / name).read_text(encoding="ascii") for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                )
            if int(quota) > 0:
                count = min(count, max(int(quota) // int(period), 1))
    return count


def physical_cores(root: Path = _ROOT) -> int:
    """Return how many cores this process may use, where two hardware threads of one core count once.

    They share the units that multiply. Outside Linux they are not told apart.
    """
    count = cores(root)
    if sys.platform != "linux":
        return count
    processors = root / "sys/devices/system/cpu"
    siblings = set()
    with suppress(OSError):
        for number in os.sched_getaffinity(0):
            siblings.add((processors / f"cpu{number}/topology/thread_siblings_list").read_text(encoding="ascii"))
        return min(count, len(siblings))
    return count


def processor(root: Path = _ROOT) -> str:
    """Return the processor's name, or at least its architecture."""
    name = _cpu_info(root).get("model name", "") or (_sysctl("-n", "machdep.cpu.brand_string") if _is_mac() else "")
    return name.strip() or platform.processor() or platform.machine()


def cpu_features(root: Path = _ROOT) -> frozenset[str] | None:
    """Return the names of the processor's instruction sets as the system spells them; None where it does not say."""
    found = _cpu_info(root)
    words = found.get("flags") or found.get("Features")
    if words is None and _is_mac():
        lines = (line.split(": ") for line in _sysctl("hw.optional").splitlines() if line.endswith(": 1"))
        words = " ".join(name.rpartition(".")[2] for name, _ in lines)
    return frozenset(words.split()) if words else None


def has_bf16(root: Path = _ROOT) -> bool | None:
    """Tell whether the processor multiplies bfloat16 itself; None where it cannot be read."""
    features = cpu_features(root)
    return None if features is None else not _BF16.isdisjoint(features)


def gpus() -> list[str]:
    """Return name and memory of each NVIDIA GPU; a name is ``""`` where there is one without a working driver."""
    listed = _said_by("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    if listed is not None:
        return [line.strip() for line in listed.splitlines() if line.strip()]
    return ["" for _ in Path("/proc/driver/nvidia/gpus").glob("*")]


def disk_free(folder: Path) -> int:
    """Return the bytes free where ``folder`` is, or would be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _cpu_info(root: Path) -> dict[str, str]:
    """Return what Linux says of the first core."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    entries = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in entries}


def _is_mac() -> bool:
    return platform.system() == "Darwin"


def _sysctl(*arguments: str) -> str:
    return _said_by("sysctl", *arguments) or ""


def _said_by(*command: str) -> str | None:
    """Return what a program of the system prints; None when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)  # noqa: S603 - fixed
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _windows_memory() -> Memory | None:
    """Ask kernel32 for MEMORYSTATUSEX (sysinfoapi.h)."""
    if sys.platform != "win32":
        return None
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            *((name, ctypes.c_uint64) for name in ("total", "available", "a", "b", "c", "d", "e")),
        )

    status = Status(length=ctypes.sizeof(Status))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return Memory(status.total, status.available)
