"""The command ``stabletrain`` and ``python -m stabletrain``."""

import sys

from stabletrain.safe_path import leave_out_current_folder

if __name__ == "__main__":
    leave_out_current_folder()  # before anything else is imported

from stabletrain.extras import pip_line


def main() -> None:
    """Run the command line; if a package that it needs is not installed, say how to install it, and exit with 2."""
    try:
        from stabletrain.cli.main import main as run

        run()
    except ModuleNotFoundError as error:
        line = pip_line(error.name)
        if line is None:
            raise
        print(f"stabletrain: the command line needs the package {error.name}: {line}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
