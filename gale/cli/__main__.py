"""``python -m gale.cli`` is ``gale``."""

from gale.cli.main import main

main()
