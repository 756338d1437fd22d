"""Built-in executors of benchbox."""
