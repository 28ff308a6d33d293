"""What a user opens and streams."""
