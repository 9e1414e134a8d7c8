"""How an H&E lies on its markers."""
