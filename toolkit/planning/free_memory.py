"""Whether this machine has the memory that a run needs, and what helps where it has not."""

import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch

from toolkit.errors import InputError
from toolkit.planning.memory import Memory
from toolkit.runtime.placement import analysis_device

OFFLOAD = "--offload"  # the option that reads blocks from disk as they are reached
CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
VERSIONS = {  # of control groups: folder, and files with limit and use, and entries of memory.stat
    "": ("", ("memory.max", "memory.current", "active_file", "inactive_file")),
    "memory": (
        "memory",
        (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_active_file",
            "total_inactive_file",
        ),
    ),
}
# In the machine's own memory, where analyses run on the CPU.
ON_HOST = ("moments", "analyses", "freed")

# The option that makes a part smaller, in the words of the message.
HELP = {
    "weights": f"--dtype bfloat16, or {OFFLOAD}",
    "activations": "a smaller --batch-tokens",
    "carried": "fewer documents (what this family's blocks leave for later ones stays in memory)",
    "sums": "--sketch (they grow with the square of the model's width)",
    "moments": "a machine with more memory (they grow with the square of the model's width alone)",
    "analyses": "a smaller --sample or --shared-sample",
    "adapters": "--dtype bfloat16",
    "changes": f"{OFFLOAD}, which leaves out low-rank changes of the weights",
    "freed": "a smaller --batch-tokens (freed memory that the C library keeps)",
    "widened": "a machine with more memory (an MLP's matrices in float32)",
    "generation": "a smaller --max-prompts or --new-tokens",
}


def available_memory(device: str = "cpu") -> float:
    """Bytes that this process may still take: its part of the machine's and of its container's,
    within its own limit; on a GPU, what is free there.
    """
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(torch.device(device))[0])
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun starts them
    left = [free / neighbours for free in (float(psutil.virtual_memory().available), *_cgroup())]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        left.append(float(limit - psutil.Process().memory_info().vms))
    return max(min(left), 0.0)


def process_size() -> float:
    """Bytes that this process holds now: before a run, Python and its libraries."""
    return float(psutil.Process().memory_info().rss)


def _cgroup(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> list[float]:
    """Return what the limits of this process's control groups leave, where there are any.

    Pages of files count as free: the system drops them before it refuses memory.
    """
    found = []
    for folder, names in _groups(root, membership):
        try:
            limit, used = (float((folder / name).read_text()) for name in names[:2])
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not this version, not visible from here, or "max": no limit
            continue
        found.append(limit - used + sum(float(stat.get(name, 0)) for name in names[2:]))
    return found


def _groups(root: Path, membership: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Folders of the groups of this process and of those around them, with their files' names."""
    for line in membership.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers in VERSIONS:
            name, names = VERSIONS[controllers]
            for path in (PurePosixPath(group), *PurePosixPath(group).parents):
                yield root / name / path.relative_to("/"), names


@dataclass(frozen=True)
class Place:
    """One memory: its name, what a run needs of it, and how many bytes of it are free."""

    name: str
    needed: Memory
    free: float

    @property
    def suffices(self) -> bool:
        return self.needed.peak <= self.free


def places(needed: Memory, device: str = "cpu") -> tuple[Place, ...]:
    """Where the parts of `needed` are held when models run on `device`, and what is free there."""
    if torch.device(device).type != "cuda":
        return (Place("memory", needed, available_memory()),)
    if analysis_device(torch.device(device)).type == "cuda":
        return (Place(f"memory of {device}", needed, available_memory(device)),)
    here, there = (
        Memory(tuple(part for part in needed.parts if (part.name in ON_HOST) == on_host))
        for on_host in (True, False)
    )
    own = Place(f"memory of {device}", there, available_memory(device))
    return own, Place("memory", here, available_memory())


def require_memory(places: Sequence[Place]) -> None:
    """Raise InputError where one of `places` does not suffice, with the option that helps."""
    for place in places:
        if place.suffices:
            continue
        part = place.needed.largest
        raise InputError(
            f"this run needs about {gib(place.needed.peak)} of {place.name} and {gib(place.free)} "
            f"are free; the largest part, {gib(part.bytes)}, are {part.name}: try "
            f"{HELP[part.name]} (--dry-run shows all parts, --no-memory-check runs all the same)"
        )


def gib(n: float) -> str:
    """Bytes in words."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 / 10 else f"{n / 2**20:.1f} MiB"
