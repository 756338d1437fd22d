"""Every error that benchbox raises on purpose; each message names the place, the cause and the fix."""


class BenchboxError(Exception):
    """Base of all deliberate errors; ``exit_code`` is what the command line ends with."""

    exit_code = 1


class GridError(BenchboxError):
    """A grid, recipe, board or settings file asks for something impossible: ``file:entry.option: what. fix``."""

    exit_code = 2


class OptionError(GridError):
    """An option of a plugin is wrong; whoever knows the file puts the place in front (``option`` names the field)."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class PluginError(BenchboxError):
    """A plugin is missing, broken or collides with another; the message names its provider."""

    exit_code = 3


class StoreError(BenchboxError):
    """The database cannot be read or written; the message gives the command that mends it."""

    exit_code = 4


class DataError(BenchboxError):
    """A data set or a weight file is missing or not what it should be; the message says what to set or fetch."""

    exit_code = 5


class ContractError(BenchboxError):
    """A plugin broke its contract inside a cell: the cell is recorded as failed and the run goes on."""
