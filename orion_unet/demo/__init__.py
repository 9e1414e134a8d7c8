"""Generated tissue: paired H&E and markers to try the toolkit on."""
