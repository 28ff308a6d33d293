"""The right piece next, as fast as it should."""
