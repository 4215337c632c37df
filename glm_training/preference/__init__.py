"""Preference pairs as losses read them, and what the reference said of them."""
