"""Real tasks: data, objective, metric and recipes."""
