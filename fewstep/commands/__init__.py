"""One command, one file. Imported only when the command runs."""
