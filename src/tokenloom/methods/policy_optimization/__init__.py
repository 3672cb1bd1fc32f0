"""Policy optimization from verifiable rewards: from outcomes to a coefficient for every token."""
