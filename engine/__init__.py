"""The training engine: trains, evaluates, generates, guards and stores; knows nothing of any screen.

Nothing is imported here on purpose: `engine.events`, `engine.commands`, `engine.profile` and `engine.store`
must be importable without MLX, because the screen and the command line use them before a run exists.
"""
