"""Webdataset tars."""
