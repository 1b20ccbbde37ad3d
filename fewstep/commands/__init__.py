"""One command, one file. Imported only when the command runs, but for `request`, which is light."""
