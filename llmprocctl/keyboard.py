"""A terminal that gives lines, and the keys ^P^Q at once.

Law: the terminal is left as it was found.

Line editing stays the terminal's own: ^P and ^Q are made two more line ends for the time being.
"""

import os
import termios
from typing import Self

_PREFIX, _DETACH = b"\x10", b"\x11"  # ^P ^Q


class Keyboard:
    """While it is entered, `read` gives lines as they are typed."""

    def __init__(self, fd: int = 0) -> None:
        self._fd = fd
        self._old = termios.tcgetattr(fd)
        self._typed = b""
        self._prefixed = False

    def __enter__(self) -> Self:
        new = termios.tcgetattr(self._fd)
        new[0] &= ~termios.IXON  # else ^Q never arrives
        new[6][termios.VEOL] = _PREFIX
        new[6][termios.VEOL2] = _DETACH
        termios.tcsetattr(self._fd, termios.TCSANOW, new)
        return self

    def __exit__(self, *_: object) -> None:
        termios.tcsetattr(self._fd, termios.TCSANOW, self._old)

    def read(self) -> list[str] | None:
        """The lines that were typed; None for ^P^Q, and for ^D on an empty line."""
        data = os.read(self._fd, 4096)
        if not data:
            return None
        lines: list[str] = []
        for key in (data[i : i + 1] for i in range(len(data))):
            if self._prefixed and key == _DETACH:
                return None
            self._prefixed = key == _PREFIX
            if key == b"\n":
                lines.append(self._typed.decode(errors="replace"))
                self._typed = b""
            elif key not in {_PREFIX, _DETACH}:
                self._typed += key
        return lines
