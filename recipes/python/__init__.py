"""Scripts to begin with; each runs as it stands, `python recipes/python/NAME.py`, and has its numbers at the top."""
