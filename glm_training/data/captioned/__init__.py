"""Captioned pictures at scale: listings, folders and webdataset tars, mixed, shuffled exactly and read by offset."""
