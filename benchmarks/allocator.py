"""The two allocator settings that every benchmark can run under: the default allocator and the warm allocator.

By default glibc returns large blocks to the operating system when they are freed, so the first write to a new tensor
of several megabytes causes a page fault for every 4 KB: a ReLU with a 51 MB output takes 21 ms into a fresh tensor and
3.3 ms into a warm one. Users get the default allocator, so it is measured (`as-shipped`). Because its page faults
dominate all other effects, the benchmarks also run in a process whose glibc is configured to retain freed memory
(`warm`). glibc reads these variables when a process starts, so the measurement runs in a child process that is started
with them. All providers in that process share the setting.
"""

from collections.abc import Mapping

GIB = 1 << 30

DEFAULT = "as-shipped"
WARM = "warm"
SETTINGS: dict[str, dict[str, str]] = {
    DEFAULT: {},
    WARM: {
        "MALLOC_MMAP_THRESHOLD_": str(16 * GIB),  # no block has a mapping of its own that free() would unmap
        "MALLOC_TRIM_THRESHOLD_": str(64 * GIB),  # the heap is never trimmed
        "MALLOC_TOP_PAD_": str(GIB // 4),  # the heap grows in large steps
    },
}
VARIABLES = tuple(SETTINGS[WARM])


def environment_for(setting: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` with exactly the allocator variables of `setting`."""
    return {key: value for key, value in environment.items() if key not in VARIABLES} | SETTINGS[setting]


def settings_for(choice: str, device: str = "cpu") -> list[str]:
    """Return the settings that the option `--allocator choice` selects.

    On a GPU that is only the default: PyTorch's caching allocator manages the memory there.
    """
    if device != "cpu":
        return [DEFAULT]
    return list(SETTINGS) if choice == "both" else [choice]
