"""``python -m align`` is ``align``, and both begin here: Ctrl-C ends in one line also while modules are still imported."""

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from align.cli import main

        return main()
    except KeyboardInterrupt:
        print("align: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
