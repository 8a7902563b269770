"""`python -m cera_train`, for `accelerate launch -m` and `torchrun -m`."""

from cera_train.cli.start import main

if __name__ == "__main__":  # the processes that a run starts import this module too
    main()
