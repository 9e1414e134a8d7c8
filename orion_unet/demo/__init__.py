"""Generated tissue: pairs of H&E and markers to try the toolkit on."""
