"""`python -m gmarpp` is the command `gmarpp`."""

from gmarpp.cli import main

if __name__ == "__main__":
    main()
