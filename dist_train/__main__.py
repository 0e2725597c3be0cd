"""`python -m dist_train`, the form that launchers start."""

from dist_train.cli import main

main()
