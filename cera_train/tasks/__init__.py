"""One file per benchmark: its prompt or gold answers, and how an answer is found and graded."""
