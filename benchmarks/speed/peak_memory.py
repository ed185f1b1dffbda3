"""Peak memory of one call beyond its input and its results, measured in a process of its own.

    python benchmarks/speed/peak_memory.py WAY n C H W LAYOUT     prints bytes

The highest resident memory during the call (VmHWM, reset before it; where that is not allowed the
peak of the process, which then was the input) less the memory before it and the results.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))


STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): sets the peak resident memory back to the current one
KILO = 1024


def extra_bytes(
    way: str,
    shape: tuple[int, int, int, int],
    layout: str,
    device: torch.device | str = "cpu",
) -> int:
    """Bytes beyond input and results at the peak of one call of a way of `spatial_ways`."""
    if torch.device(device).type == "cuda":
        return _on_cuda(way, shape, layout)
    return printed_by(__file__, way, *shape, layout)


def printed_by(script: str, *arguments: object) -> int:
    """The bytes that a script prints at its end, run in a process of its own with as many threads
    as this one."""
    command = [sys.executable, script, *map(str, arguments)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | threads
    )
    return int(done.stdout.split()[-1])


def _on_cuda(way: str, shape: tuple[int, int, int, int], layout: str) -> int:
    """The same from the counters of torch's allocator: temporaries are all torch tensors."""
    from benchmarks.speed.spatial_ways import WAYS, draw_maps

    x = draw_maps(shape, layout, "cuda")
    WAYS[way](x[:1])  # handles and workspaces of libraries, which stay
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = WAYS[way](x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - _bytes(results)


def peak_beyond(call: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Bytes beyond the results at the peak of a call in this process, and what was there before."""
    try:
        CLEAR.write_text(RESET_PEAK)
        before = _resident()
    except OSError:
        before = _process_peak()
    results = call()
    return max(0, _peak() - before - _bytes(results))


def _bytes(results: tuple[torch.Tensor, ...]) -> int:
    return sum(result.untyped_storage().nbytes() for result in results)


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    """Since the reset, or of the process."""
    return _status("VmHWM") if STATUS.exists() else _process_peak()


def _process_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILO


def _status(name: str) -> int:
    lines = STATUS.read_text().splitlines()
    return int(next(x.split()[1] for x in lines if x.startswith(name + ":"))) * KILO


def main() -> None:
    """Measure the call that the command line names."""
    from benchmarks.speed.spatial_ways import WAYS, draw_maps

    way, *sizes, layout = sys.argv[1:]
    n, channels, height, width = map(int, sizes)
    # What a first call loads and starts is not part of a call. The sizes are large enough to reach
    # the same routines, and small beside the input.
    WAYS[way](draw_maps((4, channels, height, width), layout))
    x = draw_maps((n, channels, height, width), layout)
    print(peak_beyond(lambda: WAYS[way](x)))


if __name__ == "__main__":
    main()
