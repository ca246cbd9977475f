"""`python -m retention_tui`."""

from retention_tui.cli import main

if __name__ == "__main__":
    main()
