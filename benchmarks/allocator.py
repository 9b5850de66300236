"""The two allocator settings that every benchmark can run under.

glibc hands large blocks back to the kernel when they are freed, so a tensor of some megabytes costs a page
fault for every 4 KB when it is written for the first time: a ReLU of 51 MB takes 21 ms into a fresh tensor
and 3.3 ms into a warm one. That is what users get, so it is measured (*as-shipped*); and because it drowns
everything else, so is a process whose glibc was told to keep its memory (*warm*). glibc reads these variables
when a process starts, so the measurement runs in a child process that is started with them; every provider in
it gets the same.
"""

from collections.abc import Mapping

GIB = 1 << 30

AS_SHIPPED = "as-shipped"
WARM = "warm"
SETTINGS: dict[str, dict[str, str]] = {
    AS_SHIPPED: {},
    WARM: {
        "MALLOC_MMAP_THRESHOLD_": str(16 * GIB),  # no block is mapped, and so unmapped, by itself
        "MALLOC_TRIM_THRESHOLD_": str(64 * GIB),  # the heap is never handed back
        "MALLOC_TOP_PAD_": str(GIB // 4),  # and grows in large steps
    },
}
VARIABLES = tuple(SETTINGS[WARM])


def environment_for(setting: str, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with exactly the allocator variables of `setting`."""
    return {key: value for key, value in environment.items() if key not in VARIABLES} | SETTINGS[setting]


def settings_for(choice: str, device: str = "cpu") -> list[str]:
    """The settings that an `--allocator` option asks for; a GPU's memory is PyTorch's own affair."""
    if device != "cpu":
        return [AS_SHIPPED]
    return list(SETTINGS) if choice == "both" else [choice]
