"""``python -m pglpipe``: the command line."""

from pglpipe.cli import main

if __name__ == "__main__":
    main()
