"""The Anthropic Messages dialect: `wire` requests, `events` answers, `routes`."""
