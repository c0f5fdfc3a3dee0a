class DataError(ValueError):
    """A data file is missing, damaged, or does not hold what the workload needs."""
