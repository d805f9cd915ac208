"""``python -m toolkit`` is ``oracle``."""

from toolkit.cli.main import main

main()
