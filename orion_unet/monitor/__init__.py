"""Reading a run folder: diagnosis, figures and terminal views. Never imports torch."""
