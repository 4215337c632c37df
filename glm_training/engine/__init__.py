"""What every run is made of, whatever it trains by; docs/architecture.md lists it in the order a run meets it."""
