"""For tests of plugins: closed-form models (``oracles``) on which the right answer is known exactly."""
