"""Commands that need no daemon: they read the journal, the logs and the folders of runs."""
