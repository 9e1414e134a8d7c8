"""check-data: measures the channels and cores of a folder of pairs before training, and finds what is wrong."""
