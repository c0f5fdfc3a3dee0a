"""``python -m stabletrain`` is the command line."""

from stabletrain.cli.main import main

main()
