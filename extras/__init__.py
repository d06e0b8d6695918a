"""All that goes beyond the paper, one concern a file: see docs/ and the head of each file."""
