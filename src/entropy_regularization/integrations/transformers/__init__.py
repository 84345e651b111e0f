"""Recording and penalties on Hugging Face transformers models."""
