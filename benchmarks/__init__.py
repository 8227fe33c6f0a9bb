"""Our engine against TRL, side by side: ``make bench`` on a CPU, ``python -m benchmarks.gpu`` on a GPU."""
