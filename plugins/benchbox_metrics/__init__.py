"""Built-in metrics of benchbox."""
