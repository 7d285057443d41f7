"""What the service keeps: the store."""
