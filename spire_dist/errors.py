"""The errors a user can cause, each ending in one line and exit code 2.

The command line prints `str(error)` and nothing else; a traceback means a bug. Every message names the file or setting,
the value found and what would be right. Each class also inherits the fitting built-in, so that a notebook may catch it so.
"""


class SpireError(Exception):
    """A user's mistake: its text is the one line shown."""

    exit_code = 2


class ConfigError(SpireError, ValueError):
    """A setting or command-line option that cannot be used."""


class SourceError(SpireError, ValueError):
    """An input file (STAR, .cs, .mrcs, model, map) that is missing, damaged or does not say what is needed."""


class StoreError(SpireError, ValueError):
    """A particle store that is unfinished, damaged or of another version."""


class RunError(SpireError, RuntimeError):
    """A run directory or checkpoint that cannot be used for what was asked."""


class Stopped(SpireError):
    """A run that saved and left on request (Ctrl-C, TERM, time limit); running the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL: "try again", what batch systems requeue on


class RankLostError(SpireError, RuntimeError):
    """Other ranks of a run have died or hang. What was saved is whole; starting again goes on from there."""

    exit_code = 69  # EX_UNAVAILABLE: not by its own doing; a batch system may know more about the others


class ElsewhereError(SpireError):
    """An error that another rank has already told the user."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code
