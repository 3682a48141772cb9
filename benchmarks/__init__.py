"""Speed and quality of cachepass, measured: `python -m benchmarks.bench`."""
