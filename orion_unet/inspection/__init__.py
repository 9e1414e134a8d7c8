"""Looking at a folder of pairs before training on it: the channels, the cores, and what may be wrong with them."""
