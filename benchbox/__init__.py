"""benchbox."""
