"""What the pruning cost and gained: perplexity, divergence from the dense model, latency."""
