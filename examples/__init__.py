"""One runnable script for each guide of the documentation: `python -m examples.NAME --help`."""
