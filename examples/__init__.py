"""Published methods beside jquant: `python -m examples.NAME.main` from the root, see README.md."""
