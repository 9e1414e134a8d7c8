"""Commands: options in, one call out."""
