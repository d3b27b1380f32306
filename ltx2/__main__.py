"""`python -m ltx2`."""

from ltx2.cli import main

if __name__ == "__main__":
    main()
