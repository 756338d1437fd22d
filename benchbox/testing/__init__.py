"""For tests of plugins: contract suites (``contracts``), and closed-form models (``oracles``) on which the right answer
is known exactly."""
