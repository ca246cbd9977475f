"""The run directory and its SQLite file: the truth about a run."""
