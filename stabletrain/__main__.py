"""``python -m stabletrain`` is the command line."""

from stabletrain.cli import main

main()
