"""`python -m retention_tui`, and the command `retention-tui`."""

import signal

# Until a run has handlers of its own, Ctrl+C ends the program at once and without a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from retention_tui.cli import main

if __name__ == "__main__":
    main()
