"""The way in: the short one for what is exactly as the table says, click for the rest."""

import sys

from llmprocctl import _hot


def main() -> int:
    """Run the command line; the exit status."""
    # `logs | head` ends in silence. Python ignores SIGPIPE; the socket is written with MSG_NOSIGNAL.
    _signal = __import__("_signal")  # what `signal` wraps into enums
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
    parsed = _hot.parse(sys.argv[1:])
    if parsed is None:
        from llmprocctl import cli

        return cli.main()
    from llmprocctl import session

    return session.run(*parsed)


if __name__ == "__main__":
    sys.exit(main())
