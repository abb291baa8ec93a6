"""Every error raised on purpose. Each says what was given, what was needed and one value that works.

MegabatchError
|-- UserError              the caller can fix it: the command line prints one line and exits with 2
|   |-- RecipeError        a recipe field: unknown, of the wrong type, or in contradiction with another
|   |-- SettingsError          a runtime option: workers, micro-batch, precision, all-reduce, paths
|   |-- DataError          a data set: missing, empty, damaged, not of the layout that was asked for
|   `-- CheckpointError    a checkpoint: missing, damaged, or of another recipe
|-- FetchError             no source could serve a data set
|-- DivergedError          the loss is not finite
`-- PeerError              another worker failed or did not answer in time
"""


class MegabatchError(Exception):
    """Base of all errors that megabatch raises on purpose."""


class UserError(MegabatchError, ValueError):
    """A mistake in what the caller gave; nothing was written."""


class RecipeError(UserError):
    """A recipe field is unknown, of the wrong type, or contradicts another."""


class SettingsError(UserError):
    """A runtime option cannot work on this machine or with this recipe."""


class DataError(UserError):
    """A data set is missing, empty, damaged or of an unknown layout."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another recipe."""


class FetchError(MegabatchError):
    """No source could serve a data set."""


class DivergedError(MegabatchError):
    """The loss is not finite; the last good checkpoint is kept."""


class PeerError(MegabatchError):
    """Another worker failed, or did not answer within the timeout."""
