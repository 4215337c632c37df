"""The page of a run, or of several, made of what lies in their folders: no model, no torch."""
