"""Built-in defenses of benchbox."""
