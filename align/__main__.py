"""``python -m align`` is ``align``, and both begin here: Ctrl-C ends in one line also while modules are still imported."""

import atexit
import gc
import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    # At its end Python looks for garbage in all that was imported: a second or two after torch, and it goes with the process.
    atexit.register(gc.freeze)
    try:
        from align.cli import main

        return main()
    except KeyboardInterrupt:
        print("align: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
