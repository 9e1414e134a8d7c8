"""quantify: images of markers to one row a cell."""
