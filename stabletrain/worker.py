"""``python -m stabletrain.worker run.yaml`` runs one process of a run."""

import sys

from stabletrain.safe_path import leave_out_current_folder

if __name__ == "__main__":
    leave_out_current_folder()
    from stabletrain.launch.worker import main

    sys.exit(main(sys.argv[1:]))
