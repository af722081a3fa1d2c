"""Script shim: `accelerate launch simpletuner/train.py --config_file F` is `simpletuner train --config_file F`."""

import os
import sys


def main() -> int:
    """Trains with this clone's code, wherever it is started from."""
    here = os.path.dirname(os.path.abspath(__file__))
    # Python puts a script's own folder first on the path; there `simpletuner` could not be found, and our modules would be
    # taken for top-level ones.
    sys.path[:] = [os.path.dirname(here), *(place for place in sys.path if os.path.abspath(place or ".") != here)]
    from simpletuner.cli import main as command

    return command(["train", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
