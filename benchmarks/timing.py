"""Timing of a function on a GPU, or on a CPU to try a script out."""

import statistics
import time
from collections.abc import Callable

import torch


def measure(function: Callable[[], object], device: torch.device, duration: float = 0.5) -> dict[str, float | str]:
    """Microseconds of a call: median, 20th and 80th percentile, and how they were taken.

    On a GPU several calls are captured in a CUDA graph and replayed, so that the device is timed and not the launches;
    where capturing fails, calls are timed one by one with events, launches included.
    """
    for _ in range(3):
        function()
    if device.type == 'cpu':
        times = _repeat(lambda: seconds(function, device), duration)
        return _summary(times, 'host clock')
    torch.cuda.synchronize(device)
    calls = 5
    try:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            function()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                function()
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        return _summary(_repeat(lambda: seconds(function, device), duration),
                        f'events: {str(error).splitlines()[0][:80]}')
    graph.replay()
    times = [t / calls for t in _repeat(lambda: seconds(graph.replay, device), duration)]
    # A graph keeps all that was allocated while it was captured, for itself.
    graph.reset()
    torch.cuda.empty_cache()
    return _summary(times, 'graph')


def peak_memory(function: Callable[[], object], device: torch.device) -> float | None:
    """MiB that a call allocates at most beyond what is allocated before it, or None on a CPU."""
    if device.type == 'cpu':
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2 ** 20, 1)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: by the host's clock on a CPU, by events on a GPU."""
    if device.type == 'cpu':
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _repeat(once: Callable[[], float], duration: float) -> list[float]:
    times, stop = [once() for _ in range(5)], time.perf_counter() + duration
    while time.perf_counter() < stop:
        times.append(once())
    return times


def _summary(times: list[float], clock: str) -> dict[str, float | str]:
    fifths = statistics.quantiles(times, n=5)
    return {'median_us': round(statistics.median(times) * 1e6, 2), 'p20_us': round(fifths[0] * 1e6, 2),
            'p80_us': round(fifths[3] * 1e6, 2), 'clock': clock}
