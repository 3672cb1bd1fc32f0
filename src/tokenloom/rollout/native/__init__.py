"""A decoder layer in one call on the CPU; see `block`."""
