"""Exceptions of megabatch. Messages say what was given, what was needed and one value that works.

MegabatchError
|-- UserError              invalid input: the command line prints one line to stderr and exits with code 2
|   |-- RecipeError        a recipe field: unknown, of the wrong type, or contradicting another
|   |-- SettingsError      a runtime option: workers, micro-batch, precision, all-reduce, paths
|   |-- DataError          a data set: missing, empty, corrupt, or not in the requested layout
|   |   |-- TooManyPixelsError   an image is larger than is decoded, as a decompression bomb is
|   |   `-- NoDecoderError       no installed package reads the format of an image
|   `-- CheckpointError    a checkpoint: missing, corrupt, or of another recipe
|-- FetchError             a download failed, or the cache is not writable
|-- DivergedError          the loss is not finite
|-- DesyncError            a worker's weights or data position differ from those of the others
`-- PeerError              another worker failed or timed out
"""

INVALID_INPUT = 2
"""Exit code after a `UserError`: the same command would fail again."""
STOPPED = 75
"""Exit code of a run that a signal ended before its last sample: EX_TEMPFAIL of sysexits.h, "try again later"."""


class MegabatchError(Exception):
    """Base class of all exceptions that megabatch raises deliberately."""


class UserError(MegabatchError, ValueError):
    """Invalid input from the caller; no file was written."""


class RecipeError(UserError):
    """A recipe field is unknown, has the wrong type, or contradicts another field."""


class SettingsError(UserError):
    """A runtime option is invalid on this machine or with this recipe."""


class DataError(UserError):
    """A data set is missing, empty, corrupt or in an unknown layout."""


class TooManyPixelsError(DataError):
    """An image has more pixels than are decoded, as a decompression bomb has."""


class NoDecoderError(DataError):
    """No installed package reads the format of an image."""


class CheckpointError(UserError):
    """A checkpoint is missing, corrupt or belongs to another recipe."""


class FetchError(MegabatchError):
    """A download failed from every source, or the cache folder is not writable."""


class DivergedError(MegabatchError):
    """The loss is not finite; the last good checkpoint is kept."""


class DesyncError(MegabatchError):
    """A worker's weights or data position differ from those of the others; no checkpoint was written since."""


class PeerError(MegabatchError):
    """Another worker failed or did not respond within the timeout."""
