"""The stage ``structure`` of a job: what goes whole is chosen, taken out for good, and checked against the masked model."""
