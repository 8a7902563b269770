"""What a run needs, before it runs: counted on the model itself, without its weights."""
