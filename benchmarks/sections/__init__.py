"""`results/*.json` in words and tables: a function for each file, grouped by topic."""
