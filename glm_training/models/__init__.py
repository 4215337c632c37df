"""Model families: stock modules, how to draw from them and how to replay what was drawn; adapters, loading, saving."""
