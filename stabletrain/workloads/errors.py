from stabletrain.errors import UserError


class DataError(UserError):
    """A data file is missing or damaged, or does not have the content that the workload needs."""
