"""Text sources for training and analysis."""
