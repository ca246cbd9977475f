"""The cockpit: a Textual app and a command line. Draws and asks, never computes; never imports mlx."""
