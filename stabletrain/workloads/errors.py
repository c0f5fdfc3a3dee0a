from stabletrain.errors import UserError


class DataError(UserError):
    """A data file is missing, damaged, or does not hold what the workload needs."""
