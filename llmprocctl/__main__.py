"""The way in: the short one for what is exactly as the table says, click for the rest."""

import os
import sys

from llmprocctl import _hot


def main() -> int:
    """Run the command line; the exit status."""
    # `logs | head` ends in silence. Python ignores SIGPIPE; the socket is written with MSG_NOSIGNAL.
    _signal = __import__("_signal")  # what `signal` wraps into enums
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
    _occupy()
    parsed = _hot.parse(sys.argv[1:])
    if parsed is None:
        from llmprocctl import cli

        return cli.main()
    from llmprocctl import session

    return session.run(*parsed)


def _occupy() -> None:
    """Give every standard descriptor that is closed (`>&-`) to /dev/null.

    Else the daemon's socket would be stdout. What is written to such a stdout fails.
    """
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", flags)  # the lowest number that is free, so it is this one


if __name__ == "__main__":
    sys.exit(main())
