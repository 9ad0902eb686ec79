"""`python -m rotate_ewc`: look into snapshot files."""

import sys

from rotate_ewc.inspection.command import main

if __name__ == "__main__":
    sys.exit(main())
