"""`python -m jquant` is the command `jquant`."""

from jquant.app.cli import main

if __name__ == "__main__":
    main()
