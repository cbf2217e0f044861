"""One folder per operation: `api` picks an implementation, `reference` defines it."""
