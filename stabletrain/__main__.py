"""``python -m stabletrain`` runs the command line."""

from stabletrain.safe_path import leave_out_current_folder

leave_out_current_folder()

from stabletrain.cli.main import main  # noqa: E402

main()
