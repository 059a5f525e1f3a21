"""`python -m counterflow` is the `counterflow` command."""

from counterflow.launch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
