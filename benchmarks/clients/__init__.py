"""What real clients make of the files that jquant writes."""
