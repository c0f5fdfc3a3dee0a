"""``python -m stabletrain`` runs the command line."""

from stabletrain.cli.main import main

main()
