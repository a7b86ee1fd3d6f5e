"""`python -m llmprocd` and the `llmprocd` command."""

import sys


def main() -> None:
    """Run the daemon."""
    from llmprocd import main as boot

    sys.exit(boot.main())


if __name__ == "__main__":
    main()
