"""The verbs of the command line, one file each.

A verb is a module with a function `add(verbs)`: it adds its parser to argparse's subparsers and sets `handler`, a function of the
parsed options that returns the exit code. Its heavy imports stand inside the handler, so that `align --help` is quick.
"""
