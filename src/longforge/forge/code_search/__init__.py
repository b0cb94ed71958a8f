"""Code search: the demo's environment. Questions about a Python tree, tools to search it, an exact judge."""
