"""`python -m rotate_ewc`: look into snapshot files."""

import sys

if __name__ == "__main__":
    try:
        from rotate_ewc.inspection.command import main
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "rich":
            raise
        sys.exit("python -m rotate_ewc: error: this needs rich: pip install 'rotate-ewc[cli]'")
    sys.exit(main())
