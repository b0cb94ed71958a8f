"""One folder per operation: `api` (the public function), `reference` (the specification), backends, `cases`."""
