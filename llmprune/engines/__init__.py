"""The engines: generators of events that prune a recorded model."""
