"""``python -m toolkit`` is ``oracle``."""

from toolkit.cli import main

main()
