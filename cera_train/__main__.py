"""`python -m cera_train`, for `accelerate launch -m` and `torchrun -m`."""

from cera_train.cli import main

main()
