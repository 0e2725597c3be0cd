"""dist-train, but the second of two ranks was given another seed."""

import os
import sys

from dist_train.cli import main

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        sys.argv += ["--seed", "77"]
    main()
