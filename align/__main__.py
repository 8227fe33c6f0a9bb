"""``python -m align`` is ``align``."""

from align.cli import main

raise SystemExit(main())
