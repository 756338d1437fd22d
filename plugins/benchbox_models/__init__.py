"""Built-in models of benchbox."""
