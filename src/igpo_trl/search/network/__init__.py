"""Search over a network: a server and its client, web search, and reading web pages."""
