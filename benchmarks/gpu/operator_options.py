"""Options of the benchmarks `op` and `conv` for a session on a GPU."""

import argparse

from benchmarks import options as common
from benchmarks.gpu.settings import Settings

#: Rounds of the timing: short, because the events of a GPU are precise.
TIMING = ("--repeat", "10", "--min-time", "0")


def parse(benchmark, settings: Settings, *arguments: str) -> argparse.Namespace:  # type: ignore[no-untyped-def]
    """Return the options of a benchmark's module, as its subcommand parses them."""
    parser = argparse.ArgumentParser()
    common.add_common(parser)
    benchmark.add_arguments(parser)
    tiny = ["--quick", "--dtype", "float32"] if settings.rehearse else []
    return parser.parse_args([*TIMING, "--device", settings.device, "--batch", str(settings.batch), *tiny, *arguments])
