"""Parameter trees whose leaves are read when they are needed, and where arrays lie."""
