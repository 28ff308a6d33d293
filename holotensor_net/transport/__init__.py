"""One endpoint, one request, every guard."""
