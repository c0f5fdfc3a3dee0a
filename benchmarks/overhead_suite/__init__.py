"""What benchmarks/overhead.py measures."""
