"""The HTTP service over llmprune. May import llmprune's public names only, and torch nowhere."""
