"""What a program ends with in one line instead of a traceback."""
import signal


class UserError(Exception):
    """Something the user can mend: shown as one line on stderr."""

    exit_code = 1


class UsageError(UserError):
    """A wrong argument."""

    exit_code = 2


class Stopped(UserError):
    """The run ended because a signal asked for it; where it stands has been saved."""

    def __init__(self, number, where):
        super().__init__(f"stopped by {signal.Signals(number).name} {where}")
        self.exit_code = 128 + number
