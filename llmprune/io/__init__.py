"""Files and network: models, text, checkpoints, the journal. The only code that touches either."""
