"""From a base language model to an aligned chat model, on one machine.

Importing the package is free of heavy imports: ask for the module you need, e.g. ``from align import losses``.
"""

__version__ = "0.1.0"
