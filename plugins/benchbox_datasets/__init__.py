"""Built-in datasets of benchbox."""
