"""`cera-report`: any number of runs side by side."""
