"""`python -m tokenloom`: the command line."""

from __future__ import annotations

from tokenloom.cli import main

if __name__ == "__main__":
    main()
