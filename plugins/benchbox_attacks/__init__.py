"""Built-in attacks of benchbox."""
