"""Runs for the benchmark of the findings: synthetic ones (`synthetic`), and small real trainings (`digits`)."""
