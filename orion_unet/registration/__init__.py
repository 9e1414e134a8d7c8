"""How well an H&E and its markers are aligned."""
