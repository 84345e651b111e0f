"""Room 2: the entropies of many layers, gathered into one object."""
