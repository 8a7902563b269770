"""One file per benchmark: its problems and its prompt."""
