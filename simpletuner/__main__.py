"""`python -m simpletuner` is the command `simpletuner`."""

from simpletuner.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
