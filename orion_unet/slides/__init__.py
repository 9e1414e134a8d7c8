"""Reading images of any size by region: arrays, pictures, TIFF and whole slides, and their pixel sizes."""
