"""A question: arms, each tuned, with seeds; the verdict and its page. Reads the folders of runs
only."""
