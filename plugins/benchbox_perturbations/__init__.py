"""Built-in perturbations of benchbox."""
