"""Search over a network: the server and its client, web search, and reading web pages."""
