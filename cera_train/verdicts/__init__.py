"""Whether one of two things is better: the contrast of their values, its interval, what it could
have detected, and Holm's correction over several. The only statistics of reports and studies."""
