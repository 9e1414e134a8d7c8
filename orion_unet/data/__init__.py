"""A folder of pairs becomes normalised batches on the training device."""
