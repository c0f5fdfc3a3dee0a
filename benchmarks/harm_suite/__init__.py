"""The parts of benchmarks/harm.py: healthy trainings, protections, runs, the judgement, and the result page."""
