"""python -m entropy_regularization: the same as entropy-reg."""

from entropy_regularization.cli.main import main

main()
