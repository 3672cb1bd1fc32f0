"""Recipes shipped with Tokenloom, one YAML file each."""
