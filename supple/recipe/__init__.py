"""Recipes: one YAML file from data to deployed networks, run in stages that resume."""
