"""The parts of gpu.py: what is trained, and what is measured of it."""
