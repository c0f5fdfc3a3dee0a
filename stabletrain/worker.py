"""``python -m stabletrain.worker run.yaml`` runs one process of a run."""

import sys

from stabletrain.launch.worker import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
