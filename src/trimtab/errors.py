"""The errors a user can act on. The command line prints them without a traceback and exits with code 2."""


class TrimtabError(Exception):
    """Base of every error Trimtab raises about its input. The message says what was expected, what came, what to do."""


class ConversionError(TrimtabError, ValueError):
    """A model cannot be converted or folded as asked; it has been left exactly as it was."""


class CheckpointError(TrimtabError, ValueError):
    """A checkpoint is missing, damaged, of an unknown kind, of another model, or holds more than tensors."""


class DataError(TrimtabError):
    """A data set is missing, unknown or damaged."""


class RecipeError(TrimtabError, ValueError):
    """A recipe or one of its fields is unknown or out of range."""


class RunFolderError(TrimtabError):
    """A run folder cannot be written, or already holds another run, or holds none."""
