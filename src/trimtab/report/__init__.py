"""Run logs in, one HTML file out. Nothing here imports the rest of Trimtab."""
