"""One file a kind of adapter: the file's name is the value of `adapter.kind`, its `FAMILY` does the rest."""
