"""From files on disk to normalised batches on the training device."""
