"""Built-in reports of benchbox."""
