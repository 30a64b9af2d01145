"""Everything worth a GPU in one queue, `python -m benchmarks.gpu`: what to do there, the pack that travels there, and
what becomes of what comes back."""
