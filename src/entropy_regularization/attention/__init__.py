"""Room 1: query, key, value -> attention output and the entropy of every row."""
