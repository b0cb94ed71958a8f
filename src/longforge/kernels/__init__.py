"""One folder per operation: `api` (public), `reference` (the specification), backends, `cases` (shapes)."""
