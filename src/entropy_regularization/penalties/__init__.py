"""Room 3: entropies -> one differentiable scalar; pure functions, one file per penalty."""
