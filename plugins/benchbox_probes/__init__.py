"""Built-in probes of benchbox."""
