"""The OpenAI Responses dialect: `wire` requests, `items` conversations, `events`, `store`, `routes`."""
