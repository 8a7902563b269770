"""The page of a study: its verdict, tables, pictures and protocol."""
