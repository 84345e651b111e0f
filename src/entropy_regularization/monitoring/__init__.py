"""Room 4: entropies -> what people read; never differentiable."""
