"""The commands of `python -m scx`."""
