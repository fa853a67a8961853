"""Each benchmark of BENCHMARKS (tools/benchmark.py) is a module with ``add_options`` and ``measure``."""
