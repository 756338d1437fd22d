"""Attribution methods, what can be ablated, and statistics of attributions: shared by defenses, probes and figures."""
